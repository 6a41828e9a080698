"""Tiny random vision-language targets with drafters that agree with them now and then, shaped like LLaVA (a prefix of
image features, one rotary position for each token) and like Qwen2.5-VL (three, by time, height and width)."""

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from ..conftest import HIDDEN, Pair, save_drafter, save_tokenizer

TEXT = {
    "hidden_size": HIDDEN, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256, "tie_word_embeddings": False,
    "initializer_range": 0.08, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
VISION_WIDTH, PATCH, HEADS, LAYERS = 32, 4, 2, 3
OLD_NAME = re.compile(r"^(vision_tower\.)(?!vision_model)")  # a CLIP tower's weights, as published and read by vLLM
CHAT_TEMPLATE = (
    "{%% for m in messages %%}{{ m.role }}: {%% if m.content is string %%}{{ m.content }}{%% else %%}"
    "{%% for part in m.content %%}{%% if part.type == 'text' %%}{{ part.text }}{%% else %%}%s{%% endif %%}"
    "{%% endfor %%}{%% endif %%}\n{%% endfor %%}assistant:"
)


def _save_tokenizer(folder: Path, special: list[str], image: str) -> dict[str, int]:
    """Of ASCII characters and these tokens; `image` stands for an image in prompts. Returns the tokens' ids."""
    save_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = CHAT_TEMPLATE % image
    tokenizer.save_pretrained(folder)
    return {token: tokenizer.convert_tokens_to_ids(token) for token in special} | {"all": len(tokenizer)}


def _save_processor(folder: Path, kind: str, image: dict, **others) -> None:
    """The files of a transformers processor, which cannot be made where torchvision is missing."""
    (folder / "preprocessor_config.json").write_text(json.dumps({"processor_class": kind, **image}))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": kind, **others}))


def llava(folder: Path) -> PreTrainedModel:
    ids = _save_tokenizer(folder, ["<image>"], "<image>")
    side = 8 * PATCH
    image = {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
    }  # fmt: skip
    selection = {"vision_feature_select_strategy": "default"}
    tokens = {"image_token": "<image>", "num_additional_image_tokens": 1}
    _save_processor(folder, "LlavaProcessor", image, patch_size=PATCH, **tokens, **selection)
    vision = {
        "model_type": "clip_vision_model", "hidden_size": VISION_WIDTH, "intermediate_size": 64,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "image_size": side, "patch_size": PATCH,
        "projection_dim": VISION_WIDTH,
    }  # fmt: skip
    text = {"model_type": "llama", "vocab_size": ids["all"], **TEXT}
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=ids["<image>"], tie_word_embeddings=False, **selection
    )
    return LlavaForConditionalGeneration(config)


def qwen2_5_vl(folder: Path) -> PreTrainedModel:
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    ids = _save_tokenizer(folder, special, "<|vision_start|><|image_pad|><|vision_end|>")
    image = {
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2,
        "size": {"shortest_edge": 16 * PATCH**2, "longest_edge": 256 * PATCH**2},
    }  # fmt: skip
    _save_processor(folder, "Qwen2_5_VLProcessor", image)
    video = {**image, "video_processor_type": "Qwen2VLVideoProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    vision = {
        "depth": LAYERS, "hidden_size": VISION_WIDTH, "intermediate_size": 64, "num_heads": HEADS,
        "out_hidden_size": HIDDEN, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "window_size": 8 * PATCH, "fullatt_block_indexes": [LAYERS - 1],
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    config = Qwen2_5_VLConfig(
        vision_config=vision, text_config={"vocab_size": ids["all"], **TEXT, "rope_parameters": rope},
        tie_word_embeddings=False,
        **{f"{token.strip('<|>')}_token_id": ids[token] for token in special if "pad" not in token},
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


TARGETS: dict[str, Callable[[Path], PreTrainedModel]] = {"LLaVA": llava, "Qwen2.5-VL": qwen2_5_vl}


def save_pair(folder: Path, kind: str) -> Pair:
    """kind: one of TARGETS."""
    pair = Pair(folder / "target", folder / "drafter")
    torch.manual_seed(3)
    target = TARGETS[kind](pair.target).float()
    torch.nn.init.normal_(target.get_input_embeddings().weight)
    torch.nn.init.normal_(target.get_output_embeddings().weight, std=0.5)
    target.save_pretrained(pair.target)
    weights = load_file(pair.target / "model.safetensors")
    weights = {OLD_NAME.sub(r"\1vision_model.", name): weight for name, weight in weights.items()}
    save_file(weights, pair.target / "model.safetensors")
    save_drafter(pair.drafter, target, seed=4)
    return pair


def image_url(seed: int, width: int, height: int) -> str:
    """A random picture as the data form of an OpenAI `image_url`."""
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
