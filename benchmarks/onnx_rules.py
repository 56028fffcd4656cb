"""What TensorRT's parser asks of an ONNX file, checked without TensorRT.

The table of operators (tests/data/trt_onnx_ops.json) is that of TensorRT 11.1. On top of it stand the restrictions that
a traced step can run into.
"""

import json
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import onnx

TABLE = Path(__file__).parents[1] / "tests" / "data" / "trt_onnx_ops.json"
FLOATS = {onnx.TensorProto.FLOAT: "FP32", onnx.TensorProto.FLOAT16: "FP16", onnx.TensorProto.BFLOAT16: "BF16"}


def check(path: Path) -> tuple[Counter[str], Counter[str]]:
    """The file's operators and its problems, each with how often they occur; no problems, an empty counter.

    Raises what onnx.checker raises if the file breaks the rules of ONNX itself.
    """
    onnx.checker.check_model(str(path), full_check=True)  # by path, as files above 2 GB require
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    types = _types(graph)
    problems = Counter("a tensor of type double" for kind in types.values() if kind == onnx.TensorProto.DOUBLE)
    for node in graph.node:
        problems.update(_problems(node, opset, constants, types))
    return Counter(node.op_type for node in graph.node), problems


def _problems(node: onnx.NodeProto, opset: int, constants: set[str], types: dict[str, int]) -> Iterator[str]:
    known = _table()["operators"].get(node.op_type)
    if node.domain not in ("", "ai.onnx") or known is None:
        yield f"{node.domain}::{node.op_type} is not supported"
        return
    if not known["since"] <= opset <= _table()["last_opset"]:
        yield f"{node.op_type} is not supported at opset {opset}"
    for name in node.input:
        kind = FLOATS.get(types.get(name, 0))
        if kind and kind not in known["floats"]:
            yield f"{node.op_type} is not supported in {kind}"
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
        yield f"{node.op_type} has graphs of its own, which CUDA graphs cannot hold"
    if broken := _restriction(node, attributes, constants):
        yield f"{node.op_type}: {broken}"


def _restriction(node: onnx.NodeProto, attributes: dict[str, Any], constants: set[str]) -> str | None:
    """What the table's operators are not allowed in TensorRT, or cost too much."""
    match node.op_type:
        case "Conv" | "ConvTranspose" if node.input[1] not in constants:
            return "the kernel is not an initializer"
        case "ConvTranspose" if any(pad < 0 for pad in attributes.get("pads", ())):
            return "negative padding"
        case "ScatterND" | "ScatterElements" if attributes.get("reduction", b"none") != b"none":
            return "a reduction"
        case "Resize" if attributes.get("mode", b"nearest") == b"cubic" or attributes.get("antialias"):
            return "cubic or antialiased"
        case "LayerNormalization" if len([name for name in node.output if name]) > 1:
            return "more than one output"
        case "Attention" if not attributes.get("TRT_decomposable"):
            return "may find no fused kernel"
        case name if name.startswith("Reduce") and len(node.input) > 1 and node.input[1] not in {"", *constants}:
            return "axes are not constant"
    return None


def _types(graph: onnx.GraphProto) -> dict[str, int]:
    values = [*graph.input, *graph.output, *graph.value_info]
    return {v.name: v.type.tensor_type.elem_type for v in values} | {t.name: t.data_type for t in graph.initializer}


@cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())
