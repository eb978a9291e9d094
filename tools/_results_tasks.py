"""The other models of docs/results.md: what they are calibrated on, and how well they do.

Each is pruned by `graphprune compile`, as a user would, and measured from the files that it wrote.
"""

from __future__ import annotations

import csv
import shutil
import time
import wave
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _results_run import kept_losses
from torch import Tensor

_CROPS = 7


class Task(ABC):
    """A model with data.

    Attributes:
        model: name for `tools/models`.
        calibration: section of the recipe, without what `prepare` makes.
        format: what is written and measured.
    """

    model: str
    calibration: Mapping[str, Any]
    format = "hf"

    def __init__(self, folder: Path, data: Path, work: Path) -> None:
        """A task.

        Args:
            folder: of the model.
            data: texts, images and recordings.
            work: where calibration data may be written.
        """
        self.folder, self.data, self.work = folder, data, work

    def source(self) -> Sequence[str]:
        """Arguments of `graphprune compile`."""
        return (str(self.folder),)

    @abstractmethod
    def prepare(self) -> Mapping[str, Any]:
        """Write the calibration data; the rest of the recipe's section."""

    def prepare_training(self) -> Mapping[str, Any]:
        """Write what a recipe with training sees, pruning included; likewise."""
        return self.prepare()

    @abstractmethod
    def measure(self, output: Path) -> Mapping[str, Any]:
        """What the table shows of a written model, or of `folder`."""


class Sentences(Task):
    """Sentence embeddings: STS-B."""

    model = "minilm"
    calibration: Mapping[str, Any] = {"windows": 1024, "draw": "first"}

    def prepare(self) -> Mapping[str, Any]:
        """Sentences of the development set, as the model reads them."""
        return {"data": self._tokens(self._lines()[:1024])}

    def prepare_training(self) -> Mapping[str, Any]:
        """Twice as many."""
        lines = list(dict.fromkeys(self._lines()))[:2000]
        return {"data": self._tokens(lines), "windows": len(lines)}

    def _lines(self) -> list[str]:
        return [line for pair in _pairs(self.data / "stsb/stsb-en-dev.csv") for line in pair[:2]]

    def _tokens(self, lines: Sequence[str]) -> str:
        """A file with them."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        given = tokenizer(list(lines), padding=True, return_tensors="np")
        file = self.work / f"sentences-{len(lines)}.npz"
        np.savez(file, **{name: given[name] for name in ("input_ids", "attention_mask")})
        return str(file)

    def measure(self, output: Path) -> Mapping[str, Any]:
        """On the test set, times 100: Spearman's correlation, and how near the dense model is."""
        pairs = _pairs(self.data / "stsb/stsb-en-test.csv")
        sides = [[p[i] for p in pairs] for i in (0, 1)]
        first, second = found = [self._embedded(output, side) for side in sides]
        gold = np.array([float(p[2]) for p in pairs])
        near = torch.cat(found) * torch.cat([self._embedded(self.folder, s) for s in sides])
        scores = (first * second).sum(-1).numpy()
        return {
            "spearman": 100 * float(np.corrcoef(_ranks(scores), _ranks(gold))[0, 1]),
            "cosine": 100 * float(near.sum(-1).mean()),
        }

    def _embedded(self, path: Path, sentences: Sequence[str]) -> Tensor:
        """Unit vectors: the means over tokens."""
        from transformers import AutoModel, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        model = AutoModel.from_pretrained(path, trust_remote_code=False).eval()
        found = []
        for part in _chunks(sentences, 64):
            batch = tokenizer(
                part, padding=True, truncation=True, max_length=128, return_tensors="pt"
            )
            with torch.inference_mode():
                hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].to(hidden.dtype)
            found.append((hidden * mask).sum(1) / mask.sum(1))
        return torch.nn.functional.normalize(torch.cat(found), dim=-1)


class Speech(Task):
    """Speech to text: one recording, whose first half is calibrated on."""

    model = "whisper"
    calibration: Mapping[str, Any] = {"windows": 8, "draw": "first"}
    start = (50258, 50259, 50359, 50363)  # transcript, English, transcribe, no timestamps

    def prepare(self) -> Mapping[str, Any]:
        """The first half, from silences of eight lengths on, with the dense model's transcript."""
        first, _ = self._halves()
        folder = self.work / "speech"
        folder.mkdir(exist_ok=True)
        text = self._tokenizer().decode(self._transcript(False), skip_special_tokens=True)
        for i in range(8):
            delayed = np.concatenate([np.zeros(i * 8000, np.int16), first])
            with wave.open(str(folder / f"{i}.wav"), "wb") as file:
                file.setparams((1, 2, 16000, 0, "NONE", ""))
                file.writeframes(delayed.tobytes())
            (folder / f"{i}.txt").write_text(text, encoding="utf-8")
        return {"data": str(folder)}

    def measure(self, output: Path) -> Mapping[str, Any]:
        """Perplexity of the dense model's transcript of the second half."""
        model = self._opened(output)
        ids = torch.tensor([self._transcript(True)])
        with torch.inference_mode():
            logits = model(self._features(True), decoder_input_ids=ids[:, :-1]).logits[0]
        own = len(self.start)  # tokens that are given
        losses = _losses(logits[own - 1 :], ids[0, own:])
        return {"perplexity": float(losses.mean().exp()), "losses": kept_losses(losses.tolist())}

    def _halves(self) -> tuple[Any, Any]:
        with wave.open(str(self.data / "jfk.wav"), "rb") as file:
            assert file.getparams()[:3] == (1, 2, 16000)
            samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
        # Where it is quietest around the middle.
        loud = np.convolve(np.abs(samples.astype(np.float64)), np.ones(4800), "same")
        third = len(samples) // 3
        cut = third + int(loud[third : 2 * third].argmin())
        return samples[:cut], samples[cut:]

    def _features(self, second: bool) -> Tensor:
        from transformers import WhisperFeatureExtractor

        samples = self._halves()[second].astype(np.float32) / 32768
        extractor: Any = WhisperFeatureExtractor.from_pretrained(self.folder)
        found = extractor(samples, sampling_rate=16000, return_tensors="pt").input_features
        assert isinstance(found, Tensor)
        return found

    @cache  # noqa: B019  (one task lives as long as the process)
    def _transcript(self, second: bool) -> list[int]:
        """Greedy, by the dense model."""
        model = self._opened(self.folder)
        ids = list(self.start)
        with torch.inference_mode():
            heard = model.model.encoder(self._features(second))
            while len(ids) < 64 and ids[-1] != model.config.eos_token_id:
                logits = model(encoder_outputs=heard, decoder_input_ids=torch.tensor([ids])).logits
                ids.append(int(logits[0, -1].argmax()))
        return ids

    def _opened(self, path: Path) -> Any:
        from transformers import WhisperForConditionalGeneration

        return WhisperForConditionalGeneration.from_pretrained(path).eval()

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)


class Photos(Task):
    """Images: one of each of 200 classes, half of them to calibrate on."""

    model = "efflite0"
    format = "pt2"
    # (pixel - 127) / 128, for pixels between 0 and 1.
    calibration: Mapping[str, Any] = {
        "windows": 100,
        "draw": "first",
        "size": 256,
        "mean": [127 / 255] * 3,
        "std": [128 / 255] * 3,
    }

    def source(self) -> Sequence[str]:
        """A factory and the published weights."""
        factory = Path(__file__).with_name("_results_efficientnet.py")
        return (f"{factory}:build", "--weights", str(self.folder / "model.safetensors"))

    def prepare(self) -> Mapping[str, Any]:
        """Every other photo."""
        folder = self.work / "photos"
        folder.mkdir(exist_ok=True)
        for photo in self._photos()[::2]:
            shutil.copyfile(photo, folder / photo.name)
        return {"data": str(folder)}

    def prepare_training(self) -> Mapping[str, Any]:
        """These, and seven crops of each, mirrored or not."""
        from PIL import Image

        folder, draws = self.work / "crops", np.random.default_rng(0)
        folder.mkdir(exist_ok=True)
        photos = self._photos()[::2]
        for photo in photos:
            shutil.copyfile(photo, folder / photo.name)
            with Image.open(photo) as file:
                image = file.convert("RGB")
            for number in range(_CROPS):
                side = min(int((draws.uniform(0.3, 1) * image.width * image.height) ** 0.5),
                           image.width, image.height)  # fmt: skip
                left = draws.integers(0, image.width - side + 1)
                top = draws.integers(0, image.height - side + 1)
                crop = image.crop((left, top, left + side, top + side))
                crop = crop.resize((256, 256), Image.Resampling.BICUBIC)
                if draws.random() < 0.5:
                    crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                crop.save(folder / f"{photo.stem}-{number}.JPEG", quality=95)
        return {"data": str(folder), "windows": len(photos) * (_CROPS + 1)}

    def measure(self, output: Path) -> Mapping[str, Any]:
        """On the other photos: top-1 in percent, loss, and loss of logits scaled as is best."""
        if output == self.folder:
            from models.efficientnet_lite import pretrained

            model: Any = pretrained(self.folder)
        else:
            model = torch.export.load(output).module()
        photos = self._photos()[1::2]
        labels = torch.tensor([int(photo.name[:3]) for photo in photos])
        with torch.inference_mode():
            logits = torch.cat([model(_pixels(part)) for part in _chunks(photos, 20)])
        losses = _losses(logits, labels)
        scales = torch.logspace(-1, 1, 201)
        return {
            "top1": 100 * float((logits.argmax(1) == labels).float().mean()),
            "loss": float(losses.mean()),
            "rescaled": min(float(_losses(scale * logits, labels).mean()) for scale in scales),
            "losses": kept_losses(losses.tolist()),
        }

    def _photos(self) -> list[Path]:
        return sorted((self.data / "imagenet-sample").glob("*.JPEG"))


class Genera(Task):
    """A GPT-2 over bacterial genera: sequences that the dense model has made."""

    model = "mgm"
    calibration: Mapping[str, Any] = {"windows": 96, "length": 64, "draw": "first"}

    def prepare(self) -> Mapping[str, Any]:
        """Sequences, as token ids."""
        file = self.work / "genera.npy"
        np.save(file, self._sequences()[:96].numpy())
        return {"data": str(file)}

    def measure(self, output: Path) -> Mapping[str, Any]:
        """Perplexity on other sequences."""
        from transformers import AutoModelForCausalLM

        from graphprune.quality.perplexity import perplexity

        model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=False).eval()
        found = perplexity(model, self._sequences()[96:192])
        return {"perplexity": found.value, "losses": kept_losses(found.losses)}

    @cache  # noqa: B019
    def _sequences(self) -> Tensor:
        """[192, 64], from their start: of 512 that are sampled, those that don't end before."""
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(
            self.folder, trust_remote_code=False
        ).eval()
        torch.manual_seed(0)
        start = torch.full((512, 1), model.config.bos_token_id)
        with torch.inference_mode():
            found = model.generate(
                start, do_sample=True, top_k=0, max_new_tokens=63, pad_token_id=0
            )
        whole = found[(found != 0).all(1)][:192]
        assert isinstance(whole, Tensor)
        assert whole.shape == (192, 64)
        return whole


TASKS: Mapping[str, type[Task]] = {t.model: t for t in (Sentences, Speech, Photos, Genera)}


class Tasks:
    """Measures rows of these models."""

    def __init__(self, folder: Any, data: Path, work: Path) -> None:
        """See `Task`; `folder` maps the name of a model to where it is."""
        self.folder, self.data, self.work = folder, data, work
        self.known: dict[str, tuple[Task, dict[str, Any]]] = {}

    def measure(self, row: Any) -> dict[str, Any]:
        """Compute a row: prune by the command, and measure what it wrote."""
        task, calibration = self._task(row.table)
        if not row.options:
            return dict(task.measure(task.folder))
        if "recover" in row.options:
            calibration = {**calibration, **task.prepare_training()}
        target = self.work / ("slim.pt2" if task.format == "pt2" else "slim")
        start = time.process_time()
        section = {"calibration": calibration} if _reads_data(row.options) else {}
        report = _compile(task, {**row.options, **section}, target)
        facts: dict[str, Any] = {"seconds": round(time.process_time() - start, 1)}
        facts |= task.measure(target)
        facts["parameters"] = report["after"]["parameters"]
        return facts

    def _task(self, name: str) -> tuple[Task, dict[str, Any]]:
        if name not in self.known:
            work = self.work / name
            work.mkdir()
            task = TASKS[name](Path(self.folder(name)), self.data, work)
            self.known[name] = task, {**task.calibration, **task.prepare()}
        return self.known[name]


def _reads_data(options: Mapping[str, Any]) -> bool:
    """Whether a row's recipe looks at data: what nothing reads is refused."""
    from graphprune.preflight.readers import calibrates
    from graphprune.recipe.recipe import Recipe

    return calibrates(Recipe.parse(options))


def _compile(task: Task, recipe: Mapping[str, Any], target: Path) -> dict[str, Any]:
    """Run `graphprune compile` in this process; its report."""
    import json

    import yaml
    from typer.testing import CliRunner

    from graphprune.cli.app import app

    file = target.with_name("recipe.yaml")
    file.write_text(yaml.safe_dump(dict(recipe)), encoding="utf-8")
    source, *flags = task.source()
    command = ["compile", source, str(file), "-o", str(target), *flags]
    done = CliRunner().invoke(
        app, [*command, "--format", task.format, "--overwrite", "--json"], catch_exceptions=False
    )
    if done.exit_code != 0:
        raise SystemExit(f"graphprune {' '.join(command)}:\n{done.stderr}")
    return dict(json.loads(done.stdout))


def _pairs(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.reader(file) if len(row) == 3]


def _ranks(x: Any) -> Any:
    """Average ranks."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def _pixels(photos: Sequence[Path]) -> Tensor:
    from PIL import Image

    from models.efficientnet_lite import preprocess

    found = []
    for photo in photos:
        with Image.open(photo) as file:
            image = file.convert("RGB")
        width, height = image.size
        scale = 256 / min(width, height)
        image = image.resize(
            (round(width * scale), round(height * scale)), Image.Resampling.BICUBIC
        )
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        cropped = np.array(image.crop((left, top, left + 224, top + 224)))
        found.append(torch.from_numpy(cropped).permute(2, 0, 1))
    return preprocess(torch.stack(found))


def _chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
