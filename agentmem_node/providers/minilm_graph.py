"""The ONNX graph of all-MiniLM-L6-v2, written from its safetensors weights.

Six BERT layers, hidden size 384, 12 heads. The graph is plain (no fused contrib operators):
onnxruntime's optimiser fuses it when it loads, and the result is as fast. Pooling and
normalisation stay with fastembed, so the output is the last hidden state.

Only `onnx`, `safetensors` and numpy are needed, so that a node never installs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 20  # the first with a Gelu operator
IR_VERSION = 9  # what opset 20 was released with: older onnxruntimes refuse a newer one
MASKED = np.float32(-1e9)  # added to the attention logits of padding

Weights = Mapping[str, npt.NDArray[Any]]


class _GraphWriter:
    """Adds nodes one by one; each call returns the name of the node's output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, value: npt.ArrayLike) -> str:
        if name not in self.constants:
            array = np.ascontiguousarray(value) if np.ndim(value) else np.asarray(value)
            self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def ints(self, name: str, *values: int) -> str:
        return self.constant(name, np.array(values, np.int64))

    def scalar_int(self, name: str, value: int) -> str:
        return self.constant(name, np.array(value, np.int64))

    def add(self, op: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = output or f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name


class _Encoder:
    def __init__(self, weights: Weights, config: Mapping[str, Any]) -> None:
        self.graph = _GraphWriter()
        self.weights = weights
        self.hidden = int(config["hidden_size"])
        self.heads = int(config["num_attention_heads"])
        self.layers = int(config["num_hidden_layers"])
        self.epsilon = float(config["layer_norm_eps"])

    def weight(self, name: str) -> str:
        return self.graph.constant(name, self.weights[name])

    def dense(self, x: str, name: str) -> str:
        # torch stores (out, in); ONNX multiplies from the right.
        kernel = self.graph.constant(f"{name}.kernel", self.weights[f"{name}.weight"].T)
        return self.graph.add(
            "Add", self.graph.add("MatMul", x, kernel), self.weight(f"{name}.bias")
        )

    def layer_norm(self, x: str, name: str) -> str:
        scale, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.graph.add("LayerNormalization", x, scale, bias, axis=-1, epsilon=self.epsilon)

    def embeddings(self) -> str:
        g = self.graph
        length = g.add("Gather", g.add("Shape", "input_ids"), g.scalar_int("axis_sequence", 1))
        positions = g.add("Range", g.scalar_int("zero", 0), length, g.scalar_int("one", 1))
        words = g.add("Gather", self.weight("embeddings.word_embeddings.weight"), "input_ids")
        types = g.add(
            "Gather", self.weight("embeddings.token_type_embeddings.weight"), "token_type_ids"
        )
        places = g.add("Gather", self.weight("embeddings.position_embeddings.weight"), positions)
        total = g.add("Add", g.add("Add", words, types), places)
        return self.layer_norm(total, "embeddings.LayerNorm")

    def mask_bias(self) -> str:
        """Shape (batch, 1, 1, sequence): 0 on tokens, a large negative number on padding."""
        g = self.graph
        mask = g.add("Cast", "attention_mask", to=TensorProto.FLOAT)
        mask = g.add("Unsqueeze", mask, g.ints("axes_head_row", 1, 2))
        padding = g.add("Sub", g.constant("float_one", np.float32(1)), mask)
        return g.add("Mul", padding, g.constant("masked", MASKED))

    def split_heads(self, x: str, order: list[int]) -> str:
        shape = self.graph.ints("split_shape", 0, 0, self.heads, self.hidden // self.heads)
        return self.graph.add("Transpose", self.graph.add("Reshape", x, shape), perm=order)

    def attention(self, x: str, bias: str, name: str) -> str:
        g = self.graph
        query = self.split_heads(self.dense(x, f"{name}.self.query"), [0, 2, 1, 3])
        key = self.split_heads(self.dense(x, f"{name}.self.key"), [0, 2, 3, 1])
        value = self.split_heads(self.dense(x, f"{name}.self.value"), [0, 2, 1, 3])
        scale = g.constant("scale", np.float32((self.hidden // self.heads) ** -0.5))
        logits = g.add("Add", g.add("Mul", g.add("MatMul", query, key), scale), bias)
        mixed = g.add("MatMul", g.add("Softmax", logits, axis=-1), value)
        mixed = g.add("Transpose", mixed, perm=[0, 2, 1, 3])
        mixed = g.add("Reshape", mixed, g.ints("merge_shape", 0, 0, self.hidden))
        residual = g.add("Add", self.dense(mixed, f"{name}.output.dense"), x)
        return self.layer_norm(residual, f"{name}.output.LayerNorm")

    def feed_forward(self, x: str, name: str) -> str:
        g = self.graph
        inner = g.add("Gelu", self.dense(x, f"{name}.intermediate.dense"))
        residual = g.add("Add", self.dense(inner, f"{name}.output.dense"), x)
        return self.layer_norm(residual, f"{name}.output.LayerNorm")

    def build(self) -> onnx.ModelProto:
        x, bias = self.embeddings(), self.mask_bias()
        for layer in range(self.layers):
            name = f"encoder.layer.{layer}"
            x = self.feed_forward(self.attention(x, bias, f"{name}.attention"), name)
        self.graph.add("Identity", x, output="last_hidden_state")
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
            for name in ("input_ids", "attention_mask", "token_type_ids")
        ]
        output = helper.make_tensor_value_info(
            "last_hidden_state", TensorProto.FLOAT, ["batch", "sequence", self.hidden]
        )
        graph = helper.make_graph(
            self.graph.nodes, "minilm", inputs, [output], list(self.graph.constants.values())
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="agentmem",
        )


def build_model(weights: Weights, config: Mapping[str, Any]) -> onnx.ModelProto:
    """The encoder as ONNX: `input_ids`, `attention_mask`, `token_type_ids` (int64, batch x
    sequence) to `last_hidden_state` (float32, batch x sequence x 384)."""
    return _Encoder(weights, config).build()
