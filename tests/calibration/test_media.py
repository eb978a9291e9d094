"""Images and recordings as calibration samples; and everything broken."""

from __future__ import annotations

import struct
import wave

import numpy as np
import pytest
import torch
from PIL import Image

import graphprune as gp
from calibration.helpers import gradient, pixels, samples, save_tokenizer
from graphprune.errors import LoadError
from graphprune.streaming import batches


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_an_image_is_normalised(tmp_path):
    """A picture of the model's own size, against the formula in numpy."""
    values = gradient(12, 8)
    Image.fromarray(values).save(tmp_path / "a.png")
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2)
    found = samples(pixels(), data=str(tmp_path / "a.png"), mean=mean, std=std)
    expected = (values / 255 - np.array(mean)) / np.array(std)
    torch.testing.assert_close(
        found.data, torch.from_numpy(expected).float().permute(2, 0, 1)[None]
    )
    assert (found.kind, found.count, found.notes) == ("images", 1, ())
    assumed = samples(pixels(), data=str(tmp_path / "a.png"))
    assert "ImageNet" in assumed.notes[0]
    imagenet = (values / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    torch.testing.assert_close(
        assumed.data, torch.from_numpy(imagenet).float().permute(2, 0, 1)[None]
    )


def test_images_are_scaled_cropped_and_turned(tmp_path):
    wide = np.zeros((8, 32, 3), np.uint8)
    wide[:, 10:22] = 255  # just what the crop leaves
    Image.fromarray(wide).save(tmp_path / "a.png")
    found = samples(pixels(), data=str(tmp_path / "a.png"), mean=0, std=1, size=12)
    assert found.data.shape == (1, 3, 8, 12)
    assert samples(pixels(), data=str(tmp_path / "a.png"), mean=0, std=1).data.min() == 1
    turned = Image.fromarray(gradient(8, 12))
    exif = turned.getexif()
    exif[274] = 6  # to be shown a quarter turn to the right
    turned.save(tmp_path / "b.png", exif=exif)
    found = samples(pixels(), data=str(tmp_path / "b.png"), mean=0, std=1)
    expected = np.rot90(gradient(8, 12), -1).copy()
    torch.testing.assert_close(found.data[0], torch.from_numpy(expected).permute(2, 0, 1) / 255)
    with pytest.raises(LoadError, match="smaller than the model's input"):
        samples(pixels(), data=str(tmp_path / "a.png"), size=11)
    with pytest.raises(LoadError, match="2 numbers for 3 channels"):
        samples(pixels(), data=str(tmp_path / "a.png"), mean=[0.5, 0.5])


def test_a_directory_of_images(tmp_path):
    for name, value in (("b/1.PNG", 30), ("a.jpg", 10), ("c.webp", 40), ("b/0.bmp", 20)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (24, 16), value).save(tmp_path / name)
    (tmp_path / "readme.md").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes(b"")
    wanted = {"data": str(tmp_path), "mean": 0, "std": 1 / 255}
    found = samples(pixels(), draw="first", **wanted)
    assert found.data[:, 0, 4, 6].round().tolist() == [10, 20, 30, 40]
    drawn = [samples(pixels(), seed=s, windows=3, **wanted).data[:, 0, 4, 6] for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    with pytest.raises(LoadError, match=r"4, and calibration\.windows is 9"):
        samples(pixels(), windows=9, **wanted)
    (tmp_path / "b" / "2.png").write_bytes((tmp_path / "b" / "1.PNG").read_bytes()[:45])
    with pytest.raises(LoadError, match="image can't be read") as caught:
        samples(pixels(), **wanted)
    assert "2.png" in str(caught.value)


def test_the_image_processor_of_a_checkpoint(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=8, image_size=16, patch_size=8)  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.2] * 3)
    processor.save_pretrained(tmp_path / "vit")
    program = gp.load(str(tmp_path / "vit"))
    image = Image.fromarray(gradient(30, 20))
    image.save(tmp_path / "a.png")
    found = samples(program, data=str(tmp_path / "a.png"))
    expected = processor(images=image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found.data, expected)
    assert not found.notes
    own = samples(program, data=str(tmp_path / "a.png"), mean=0.5, std=0.5)
    assert not torch.allclose(own.data, expected)
    ViTImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(tmp_path / "vit")
    with pytest.raises(LoadError, match="doesn't have the size"):
        samples(program, data=str(tmp_path / "a.png"))


def save_wave(path, values, rate=16000, width=2, channels=1):
    scaled = np.round(np.asarray(values) * (2 ** (8 * width - 1) - 1)).astype(np.int64)
    if width == 1:
        raw = (scaled + 128).astype(np.uint8).tobytes()
    else:
        raw = b"".join(struct.pack("<q", int(v))[:width] for v in scaled.flatten())
    with wave.open(str(path), "wb") as out:
        out.setparams((channels, width, rate, 0, "NONE", "NONE"))
        out.writeframes(raw)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    path = tmp_path_factory.mktemp("whisper")
    config = WhisperConfig(vocab_size=96, d_model=16, encoder_layers=1, decoder_layers=1,
                           encoder_attention_heads=2, decoder_attention_heads=2,
                           encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=8,
                           max_source_positions=50, max_target_positions=20, pad_token_id=0,
                           bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)  # fmt: skip
    WhisperForConditionalGeneration(config).save_pretrained(path)
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    extractor.save_pretrained(path)
    return gp.load(str(path)), extractor


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_recordings_of_any_width(tmp_path, whisper, width):
    program, extractor = whisper
    wave_of = np.sin(np.arange(9000) / 20) * 0.5
    save_wave(tmp_path / "a.wav", wave_of, width=width)
    found = samples(program, data=str(tmp_path / "a.wav"))
    top = 2 ** (8 * width - 1)
    rounded = (np.round(wave_of * (top - 1)) / top).astype(np.float32)
    expected = extractor(rounded, sampling_rate=16000, return_tensors="pt")
    assert found.data["input_features"].shape == (1, 8, 100)
    torch.testing.assert_close(found.data["input_features"], expected["input_features"])
    assert torch.equal(found.data["decoder_input_ids"], program.example[1]["decoder_input_ids"][:1])
    assert "random tokens" in found.notes[0]
    batches(program, found.data)


def test_long_recordings_in_pieces_and_transcripts(tmp_path, whisper, tokenizer):
    program, extractor = whisper
    left = np.sin(np.arange(40000) / 30)
    stereo = np.stack([left, -left * 0.5], axis=1)
    save_wave(tmp_path / "a.wav", stereo, channels=2)
    found = samples(program, data=str(tmp_path))
    assert found.data["input_features"].shape == (3, 8, 100)  # 2.5 seconds in pieces of one
    expected = extractor((left * 0.25).astype(np.float32)[16000:32000], sampling_rate=16000,
                         return_tensors="pt")["input_features"]  # fmt: skip
    torch.testing.assert_close(found.data["input_features"][1:2], expected, atol=0.02, rtol=0)
    assert samples(program, data=str(tmp_path), windows=2).count == 2
    with pytest.raises(LoadError, match=r"3, and calibration\.windows is 4"):
        samples(program, data=str(tmp_path), windows=4)
    (tmp_path / "a.wav").unlink()
    for name, said in (("b", "ABC"), ("c", "ABCDE")):
        save_wave(tmp_path / f"{name}.wav", left[:9000])
        (tmp_path / f"{name}.txt").write_text(said + "\n")
    found = samples(program, data=str(tmp_path), tokenizer=tokenizer, draw="first")
    assert [s["decoder_input_ids"].tolist() for s in found.data] == [[[32, 33]], [[32, 33, 34, 35]]]
    assert (found.count, found.tokens, found.notes) == (2, 6, ())
    assert [b.first for b in batches(program, found.data)] == [0, 1]


def test_recordings_that_can_not_be_used(tmp_path, whisper):
    program, _ = whisper
    save_wave(tmp_path / "a.wav", np.zeros(100), rate=8000)
    with pytest.raises(LoadError, match="8000 samples per second, and the model reads 16000"):
        samples(program, data=str(tmp_path / "a.wav"))
    save_wave(tmp_path / "a.wav", np.zeros(1000))
    (tmp_path / "a.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:-100])
    with pytest.raises(LoadError, match="recording can't be read") as caught:
        samples(program, data=str(tmp_path / "a.wav"))
    assert "too early" in str(caught.value)
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    with pytest.raises(LoadError, match="recording can't be read"):
        samples(program, data=str(tmp_path / "a.wav"))
    with pytest.raises(LoadError, match="doesn't read audio"):
        samples(pixels(), data=str(tmp_path / "a.wav"))
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(LoadError, match="images and recordings"):
        samples(pixels(), data=str(tmp_path))
    with pytest.raises(LoadError, match="doesn't read images"):
        samples(program, data=str(tmp_path / "a.png"))
