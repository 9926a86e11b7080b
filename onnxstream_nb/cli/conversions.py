"""The flags of the verbs that write models, as tables."""

from __future__ import annotations

from .options import Option, choice, number, text, truth, whole

OUTPUT = (
    Option(
        ("-o", "--out"),
        "what to write: a folder, or one file when its name ends in .onnx",
        text, "OUT", required=True,
    ),
    Option(
        ("--overwrite",), "replace OUT where it exists, once the new one is complete",
        truth, default=False,
    ),
)  # fmt: skip
ROUNDING = (
    Option(
        ("--block",), "how many weights share a scale, 0 for a whole column; default 32",
        whole(0), "N",
    ),
    Option(
        ("--asymmetric",), "integers with a zero point for each block", truth, default=False
    ),
    Option(
        ("--keep",),
        "store layers that match a pattern otherwise, as in *down_proj*=int8 or head=fp16; may be"
        " repeated",
        text, "PATTERN=DTYPE", repeat=True,
    ),
    Option(
        ("--matmul-nbits",), "write MatMulNBits, an operator of onnxruntime's own",
        truth, default=False,
    ),
)  # fmt: skip
CONVERT = (
    *OUTPUT,
    Option(
        ("--to",), "onnx, or onnxstream: a folder with model.txt; default onnx",
        choice("onnx", "onnxstream"), "KIND", default="onnx",
    ),
    Option(
        ("--dtype",),
        "what weights are stored as: fp32, fp16, bf16, or rounded to int8 or int4; default: what"
        " they are, and fp16 for a GGUF's block encodings",
        choice("fp32", "fp16", "bf16", "int8", "int4"), "TYPE",
    ),
    *ROUNDING,
)  # fmt: skip
QUANTIZE = (
    *OUTPUT,
    Option(
        ("--method",),
        "weights alone: rtn (to nearest), awq (channels that matter made larger), gptq (errors made"
        " good by later columns); also activations, in 8 bits: dynamic, static; default rtn",
        choice("rtn", "awq", "gptq", "dynamic", "static"), "NAME", default="rtn",
    ),
    Option(
        ("--dtype",), "int4 or int8; default: int4, and int8 with activations",
        choice("int4", "int8"), "TYPE",
    ),
    Option(
        ("--calibration",),
        "a file of UTF-8 text for awq, gptq and static to see the model at work on; for static also"
        " .npz files of inputs, or a folder of them",
        text, "FILE",
    ),
    Option(("--tokens",), "read N tokens of the calibration text; default 16384", whole(8), "N"),
    *ROUNDING,
    Option(
        ("--scales",), "store scales as float16 or float32; default float16",
        choice("float16", "float32"), "TYPE",
    ),
    Option(
        ("--plain",),
        "scales that cover a block's range, instead of those of least error",
        truth, default=False,
    ),
    Option(
        ("--range-data",),
        "file of ranges for static: read where it exists, else written after calibration",
        text, "FILE",
    ),
    Option(
        ("--percentile",), "of activations that static keeps in range; default 100",
        number(50, 100), "P",
    ),
)  # fmt: skip
VOCAB = (
    Option(("-o", "--out"), "a file to write: NAME.txt or NAME.model", text, "OUT", required=True),
    OUTPUT[1],
)
EXPORT = (
    *OUTPUT,
    Option(
        ("--exporter",),
        "opset14: by tracing, decomposed operators that every engine knows; opset23: by"
        " torch.export, with Attention, RMSNormalization and RotaryEmbedding; default opset14",
        choice("opset14", "opset23"), "KIND", default="opset14",
    ),
    Option(
        ("--dtype",), "how weights are stored; default: as the model's files have them",
        choice("fp32", "fp16", "bf16"), "TYPE",
    ),
    Option(
        ("--module",),
        "export any other PyTorch module: a function of an importable package that returns"
        " (module, example inputs) and, if it likes, a dict of names and dynamic axes",
        text, "PKG:FACTORY",
    ),
)  # fmt: skip
