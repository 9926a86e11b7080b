"""Seconds that the first run takes to compile its kernels: an empty cache against a full one.

python bench/compile.py [MODEL]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from harness import engine, model_path, report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    path = model_path(parser.parse_args().model)
    command = ["generate", path, "--prompt", "Hello", "--max-tokens", "4", "--temperature", "0"]
    with tempfile.TemporaryDirectory() as cache:
        environment = {"ONNXSTREAM_CACHE": cache}
        first = engine(*command, environment=environment).first_output_s
        second = engine(*command, environment=environment).first_output_s
        kept = sum(p.stat().st_size for p in Path(cache).rglob("*") if p.is_file())
    rows = [
        ("first run", f"{first:.2f}"), ("second run", f"{second:.2f}"),
        ("compilation", f"{first - second:.2f}"), ("kernel cache, MB", f"{kept / 1e6:.1f}"),
    ]  # fmt: skip
    document = {
        "benchmark": "compile", "model": path, "first_s": first, "second_s": second,
        "compile_s": first - second, "cache_bytes": kept,
    }  # fmt: skip
    report(("seconds to the first token", ""), rows, document)


if __name__ == "__main__":
    main()
