"""Prints, as JSON, what Torch-TensorRT makes of a decode step. Run as a program: `no_gpu.py` says why."""

import json

import tensorrt_rtx

from attnpack_fx.export import torch_tensorrt_engines
from attnpack_fx.export.steps import DecodeStep
from tests.export.no_gpu import torch_tensorrt_without_gpu
from tests.export.tiny import captured, coded_llava


def main() -> None:
    torch_tensorrt_without_gpu()
    (decode,) = captured(coded_llava(), DecodeStep)
    each = torch_tensorrt_engines.within(decode)
    covered = torch_tensorrt_engines.coverage(each)
    engine = torch_tensorrt_engines.engine(tensorrt_rtx, each)
    found = {
        "total": covered.total,
        "supported": covered.supported,
        "unsupported": covered.unsupported,
        "bytes": len(engine),
        "vision_length": each.ranges["vision_length"].least,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
