// The API's page, from the server's own OpenAPI description.

/** @param {string} tag @param {string} text */
function element(tag, text) {
  const node = document.createElement(tag);
  node.textContent = text;
  return node;
}

/** @param {any} schema @param {any} all @returns {any} the schema that a reference means */
function resolved(schema, all) {
  const name = schema?.$ref?.split("/").pop();
  return name ? all.components.schemas[name] : schema;
}

async function start() {
  const token = sessionStorage.getItem("token");
  const answer = await fetch("/openapi.json", { headers: token ? { authorization: `Bearer ${token}` } : {} });
  if (!answer.ok) throw new Error(`the server answered ${answer.status}; open the page first and give the token there`);
  const api = await answer.json();
  const nodes = [];
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, call] of Object.entries(/** @type {Record<string, any>} */ (methods))) {
      const box = document.createElement("details");
      box.append(element("summary", `${method.toUpperCase()} ${path}: ${call.summary}`));
      box.append(element("p", call.description ?? ""));
      const list = document.createElement("dl");
      for (const one of call.parameters ?? []) {
        list.append(element("dt", `${one.name} (${one.in})`), element("dd", one.description ?? one.schema?.type ?? ""));
      }
      for (const [kind, body] of Object.entries(/** @type {Record<string, any>} */ (call.requestBody?.content ?? {}))) {
        const properties = resolved(body.schema, api)?.properties ?? {};
        list.append(element("dt", "body"), element("dd", kind));
        for (const [name, field] of Object.entries(/** @type {Record<string, any>} */ (properties))) {
          list.append(element("dt", name), element("dd", field.description ?? field.type ?? ""));
        }
      }
      box.append(list);
      nodes.push(box);
    }
  }
  document.getElementById("calls")?.replaceChildren(...nodes);
}

start().catch((error) => document.getElementById("calls")?.replaceChildren(element("p", error.message)));
