"""A stand-in for `tensorrt.plugin`, after NVIDIA's documentation of Quick Deployable Plugins.

It refuses what the documentation rules out when a function is registered, and `build` calls the functions in the order
of an engine's build: shapes and types, formats with their tactics, then the compiled kernel of each tactic.
"""

import inspect
import types
import typing

import numpy as np

LINEAR = "LINEAR"


class Expr:
    """A dimension that is known when the engine runs, in words."""

    def __init__(self, words):
        self.words = words

    def __eq__(self, other):
        return isinstance(other, Expr) and self.words == other.words

    __hash__ = None


class TensorDesc:
    def __init__(self, name, shape, dtype):
        self.shape = shape
        self.shape_expr = [Expr(f"{name}[{axis}]") for axis in range(len(shape))]
        self.dtype = dtype

    def like(self):
        copied = TensorDesc.__new__(TensorDesc)
        copied.__dict__.update(self.__dict__)
        return copied


class AutoTuneCombination:
    def __init__(self, io_types=None, layouts=None, tactics=None):
        self.types = [name.strip() for name in io_types.split(",")]
        assert layouts == LINEAR
        assert all(isinstance(tactic, int) and tactic > 0 for tactic in tactics)
        self.tactics = list(tactics)


class KernelLaunchParams:
    def __init__(self):
        self.grid_x = self.grid_y = self.grid_z = self.block_x = self.block_y = self.block_z = 1
        self.shared_mem = 0


class SymIntExprs:
    def __init__(self, length):
        self.exprs = [None] * length

    @classmethod
    def from_tuple(cls, exprs):
        made = cls(len(exprs))
        made.exprs = list(exprs)
        return made


class Plugin:
    describe = choose = compile = None


def module(version="10.9.0"):
    """(tensorrt, tensorrt.plugin) of a version; before 10.9 there is no `aot_impl`."""
    trt, trtp = types.ModuleType("tensorrt"), types.ModuleType("tensorrt.plugin")
    trt.__version__, trt.float32, trt.float16, trt.bfloat16 = version, "FP32", "FP16", "BF16"
    plugins = trtp.plugins = {}

    def register(plugin_id):
        def decorate(function):
            assert plugin_id not in plugins, f"{plugin_id} is registered twice"
            namespace, _, name = plugin_id.partition("::")
            assert name
            assert namespace not in ("", "trt", "tensorrt", "std")
            signature = inspect.signature(function)
            kinds = [parameter.annotation for parameter in signature.parameters.values()]
            assert inspect.Parameter.empty not in kinds
            assert all(p.default is inspect.Parameter.empty for p in signature.parameters.values())
            tensors = [kind is TensorDesc for kind in kinds]
            assert tensors == sorted(tensors, reverse=True), "tensors come first"
            for kind in kinds[sum(tensors) :]:
                array = typing.get_origin(kind) is np.ndarray
                assert array or kind in (int, float, bytes, bool, str)
            assert signature.return_annotation is TensorDesc
            plugins[plugin_id] = Plugin()
            plugins[plugin_id].describe = function
            return function

        return decorate

    def follows(plugin_id, function, more):
        """The signature of `register`, then `more`; annotations as there."""
        first = inspect.signature(plugins[plugin_id].describe).parameters
        found = inspect.signature(function).parameters
        assert list(found) == [*first, *more]
        assert all(found[name].annotation == first[name].annotation for name in first)
        assert typing.get_args(found["outputs"].annotation) == (TensorDesc,)

    def autotune(plugin_id):
        def decorate(function):
            follows(plugin_id, function, ["outputs"])
            assert inspect.signature(function).return_annotation == list[AutoTuneCombination]
            plugins[plugin_id].choose = function
            return function

        return decorate

    def aot_impl(plugin_id):
        def decorate(function):
            follows(plugin_id, function, ["outputs", "tactic"])
            signature = inspect.signature(function)
            assert signature.parameters["tactic"].annotation is int
            name, code, launch, extra = typing.get_args(signature.return_annotation)
            assert {name, code} <= {str, bytes}
            assert (launch, extra) == (KernelLaunchParams, SymIntExprs)
            plugins[plugin_id].compile = function
            return function

        return decorate

    trtp.register, trtp.autotune = register, autotune
    if tuple(int(part) for part in version.split(".")[:2]) >= (10, 9):
        trtp.aot_impl = aot_impl
    for thing in (TensorDesc, AutoTuneCombination, KernelLaunchParams, SymIntExprs):
        setattr(trtp, thing.__name__, thing)
    return trt, trtp


def part_of(tensorrt):
    """`tensorrt.plugin` of a module of tests/fakes/fake_tensorrt.py; a registration is noted in its `calls`."""
    _, trtp = module(tensorrt.__version__)
    kinds = {"FLOAT": "FP32", "HALF": "FP16", "BF16": "BF16"}
    tensorrt.float32, tensorrt.float16, tensorrt.bfloat16 = "FP32", "FP16", "BF16"
    register = trtp.register

    def noted(plugin_id):
        tensorrt.calls.append(("plugin.register", (plugin_id,)))
        return register(plugin_id)

    def compiled(plugin_id, tensors, fields):
        """The kernels' names of a node. Of its attributes the plugin gets those that it named, typed as there."""
        parameters = list(inspect.signature(trtp.plugins[plugin_id].describe).parameters.values())
        names = [parameter.name for parameter in parameters]
        attributes = {
            parameter.name: np.array(fields[parameter.name])
            if parameter.annotation is not int
            else fields[parameter.name]
            for parameter in parameters[len(tensors) :]
        }
        shapes = {name: tuple(tensor.shape) for name, tensor in zip(names, tensors, strict=False)}
        (kind,) = {kinds[tensor.dtype.name] for tensor in tensors}
        return [kernel[0] for kernel in build(trtp, plugin_id, shapes, kind, attributes)[1].values()]

    trtp.register, trtp.compiled = noted, compiled
    tensorrt.plugin = trtp
    return trtp


def build(trtp, plugin_id, shapes, dtype, attributes):
    """(output, {tactic: (kernel name, PTX, launch, extra)}) of one node. shapes: of its inputs; -1 is the batch."""
    plugin = trtp.plugins[plugin_id]
    inputs = [TensorDesc(name, shape, dtype) for name, shape in shapes.items()]
    output = plugin.describe(*inputs, **attributes)
    [combination] = plugin.choose(*inputs, *attributes.values(), (output,))
    assert combination.types == [dtype] * (len(inputs) + 1)
    return output, {
        tactic: plugin.compile(*inputs, *attributes.values(), (output,), tactic) for tactic in combination.tactics
    }
