"""Write manifest.txt anew: `python tests/conformance/update.py` lists every case that passes."""

from __future__ import annotations

import warnings

from test_conformance import CASES, MANIFEST, test_node


def passes(name: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            test_node(name)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
            return False
    return True


if __name__ == "__main__":
    names = sorted(filter(passes, CASES))
    MANIFEST.write_text("\n".join(names) + "\n", "utf-8")
    print(f"{len(names)} of {len(CASES)} pass")
