// The errors of the engine, each with words for the person at the page.

/** The picture, the mask or an option cannot be served as given. */
export class InputError extends Error {
  name = "InputError";
}

/** The network's result is not a picture. */
export class OutputError extends Error {
  name = "OutputError";
}

/** A device computes a graph wrongly. */
export class DeviceError extends Error {
  name = "DeviceError";
}
