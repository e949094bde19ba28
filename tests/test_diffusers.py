"""PARO in diffusers' video transformers: tiny ones with random weights, run by plans."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastattn
from cases import relative_error
from fastattn import ParoPlan, calibrate_paro, paro_attention
from fastattn.integrations.diffusers import apply_paro, calibrate_model, record_attention
from fastattn.paro import _pack

diffusers = pytest.importorskip("diffusers", reason="needs fastattn[diffusers]")

GRID, HEADS, DIM, LAYERS, TEXT = (4, 9, 10), 2, 16, 2, 7  # 360 tokens: no whole number of blocks


def cogvideox() -> nn.Module:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=DIM,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=LAYERS,
        sample_width=20,
        sample_height=18,
        sample_frames=13,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    )


def wan() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=DIM,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=LAYERS,
        rope_max_seq_len=32,
    )


class Video:
    """A model that attends to what is alike, and a video alike along its width, with and without guidance."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self.model: Any = make().eval().requires_grad_(False)
        self.text = TEXT if make is cogvideox else 0
        self.blocks = self.model.transformer_blocks if make is cogvideox else self.model.blocks
        for block in self.blocks:
            block.attn1.norm_q.weight.mul_(3)
            block.attn1.to_k.load_state_dict(block.attn1.to_q.state_dict())
        latents = torch.randn(2, 4, 1, 1, 20) + 0.2 * torch.randn(2, 4, 4, 18, 20)
        self.inputs = {"hidden_states": latents, "encoder_hidden_states": torch.randn(2, TEXT, 16)}
        if make is cogvideox:
            self.inputs["hidden_states"] = latents.transpose(1, 2)  # frames before channels
            self.inputs["image_rotary_emb"] = diffusers.models.embeddings.get_3d_rotary_pos_embed(
                DIM, ((0, 0), GRID[1:]), GRID[1:], GRID[0]
            )
        schedulers = diffusers.CogVideoXDDIMScheduler, diffusers.FlowMatchEulerDiscreteScheduler
        self.scheduler = schedulers[make is wan]()
        self.scheduler.set_timesteps(4)

    def to(self, device: str, dtype: torch.dtype) -> "Video":
        self.model.to(device, dtype)
        self.inputs = torch.utils._pytree.tree_map(lambda x: x.to(device, dtype), self.inputs)
        self.scheduler.timesteps = self.scheduler.timesteps.to(device)
        return self

    def __call__(self, step: int = 0, **inputs: Any) -> Tensor:
        timestep = self.scheduler.timesteps[step].expand(2)
        return self.model(timestep=timestep, **{**self.inputs, **inputs}).sample

    def plan(self, keep: Callable[[Tensor], Tensor], buckets: int = 1) -> ParoPlan:
        """Every order, and the blocks that ``keep`` makes of the mask of all."""
        blocks = -(-(self.text + 360) // 64)
        mask = keep(torch.ones(buckets, LAYERS, HEADS, blocks, blocks, dtype=torch.bool))
        orders = torch.arange(buckets * LAYERS * HEADS, dtype=torch.uint8) % 6
        return ParoPlan(GRID, self.text, (64, 64), orders.view(buckets, LAYERS, HEADS), _pack(mask))


@pytest.fixture(params=[cogvideox, wan], ids=["CogVideoX", "Wan"])
def video(request: pytest.FixtureRequest) -> Video:
    return Video(request.param)


def diagonal(mask: Tensor) -> Tensor:
    return mask & torch.eye(mask.shape[-1], dtype=torch.bool)


def test_all_blocks_are_the_model_and_closing_restores_its_bits(video: Video, place: tuple[str, torch.dtype]) -> None:
    stock = video.to(*place)()
    stack = apply_paro(video.model, video.plan(lambda mask: mask))
    ours = video()
    assert not torch.equal(ours, stock)
    assert relative_error(ours, stock.double()) < (1e-6 if place[1] == torch.float32 else 1e-2)
    stack.close()
    assert torch.equal(video(), stock)


def test_each_layer_gets_its_own_plan_and_cross_attention_none(video: Video) -> None:
    """Against the model with attention written out, layer by layer."""
    plan = video.plan(diagonal)
    seen = []

    def written_out(layer: int) -> Callable[..., Tensor]:
        def attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
            seen.append(layer)
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            return paro_attention(q, k, v, plan.layer(layer)).transpose(1, 2)

        return attention

    with pytest.MonkeyPatch.context() as patch:
        exact = torch.nn.functional.scaled_dot_product_attention
        for layer, block in enumerate(video.blocks):
            block.attn1.register_forward_pre_hook(
                lambda *_, layer=layer: patch.setattr(
                    torch.nn.functional, "scaled_dot_product_attention", written_out(layer)
                )
            )
            block.attn1.register_forward_hook(
                lambda *_: patch.setattr(torch.nn.functional, "scaled_dot_product_attention", exact)
            )
        expected = video()
    assert seen == list(range(LAYERS))
    for block in video.blocks:
        block.attn1._forward_pre_hooks.clear()
        block.attn1._forward_hooks.clear()
    with apply_paro(video.model, plan):
        assert torch.equal(video(), expected)


def test_samples_are_what_attention_gets(video: Video) -> None:
    """The output of the first layer's attention is made of them."""
    outputs = []
    attention = video.blocks[0].attn1
    handle = attention.to_out[0].register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    samples: list[Any] = []
    stock = video()
    with record_attention(video.model, samples.append):
        assert torch.equal(video(), stock)
        assert torch.equal(video(), stock)
    handle.remove()
    assert [sample[:2] for sample in samples] == [(0, layer) for layer in range(LAYERS)]
    q, k, v = samples[0][2:]
    assert q.shape == (2, video.text + 360, HEADS, DIM)
    assert relative_error(fastattn.attention(q, k, v).flatten(2), outputs[0].double()) < 1e-6


def test_half_of_the_blocks_are_close(video: Video) -> None:
    """Closer than as many others."""
    stock = video()
    plan = calibrate_model(video.model, video, density=0.5)
    samples: list[Any] = []
    with record_attention(video.model, samples.append):
        video()
    again = calibrate_paro(samples, grid=GRID, text=video.text, density=0.5)
    assert torch.equal(again.orders, plan.orders)
    assert torch.equal(again.masks, plan.masks)
    mask = torch.stack([plan.mask(0, layer) for layer in range(LAYERS)])[None]
    others = replace(plan, masks=_pack(mask[..., torch.randperm(mask.shape[-1])]))
    errors = []
    for each in (plan, others):
        with apply_paro(video.model, each):
            errors.append(relative_error(video(), stock.double()))
    assert errors[0] < 0.02
    assert errors[0] < 0.5 * errors[1]


def test_the_step_chooses_the_bucket(video: Video, device: str, dtype: torch.dtype) -> None:
    video.to(device, dtype)
    plan = video.plan(lambda mask: mask, buckets=2)
    masks = torch.stack([plan.masks[0], _pack(diagonal(plan.mask(0, 0)[None].expand(LAYERS, -1, -1, -1)))])
    plan = replace(plan, masks=masks)
    parts = [replace(plan, orders=plan.orders[i : i + 1], masks=plan.masks[i : i + 1]) for i in range(2)]
    expected = []
    for step in range(4):
        with apply_paro(video.model, parts[step // 2]):
            expected.append(video(step))
    with apply_paro(video.model, plan, scheduler=video.scheduler):
        for step in (0, 1, 2, 3, 0):
            assert torch.equal(video(step), expected[step])
    samples: list[Any] = []
    with record_attention(video.model, samples.append, buckets=2, scheduler=video.scheduler):
        for step in range(4):
            video(step)
    assert [sample[:2] for sample in samples] == [(bucket, layer) for bucket in range(2) for layer in range(LAYERS)]
    calibrated = calibrate_model(
        video.model, lambda: [video(step) for step in range(4)], density=0.5, buckets=2, scheduler=video.scheduler
    )
    expected_plan = calibrate_paro(samples, grid=GRID, text=video.text, density=0.5)
    assert torch.equal(calibrated.orders, expected_plan.orders)
    assert torch.equal(calibrated.masks, expected_plan.masks)


def test_fused_projections_and_other_processors_are_the_model_s_affair(video: Video) -> None:
    video.model.fuse_qkv_projections()
    stock = video()
    with apply_paro(video.model, video.plan(lambda mask: mask)):
        assert relative_error(video(), stock.double()) < 1e-6
        video.model.unfuse_qkv_projections()
        assert relative_error(video(), stock.double()) < 1e-6


def test_compiled_blocks(video: Video) -> None:
    plan = video.plan(diagonal)
    with apply_paro(video.model, plan):
        expected = video()
        for block in video.blocks:
            block.compile(backend="eager")
        assert relative_error(video(), expected.double()) < 1e-6


def test_frames_that_are_given(video: Video) -> None:
    """Wan 2.2 gives each token its timestep, 0 where the video is known; CogVideoX takes numbers too."""
    step = video.scheduler.timesteps[3]
    samples: list[Any] = []
    with record_attention(video.model, samples.append, buckets=4, scheduler=video.scheduler):
        if video.text == 0:
            tokens = step * (torch.arange(360) >= 90).expand(2, -1)
            video.model(timestep=tokens, **video.inputs)
        else:
            video(3)
    assert [sample[0] for sample in samples] == [3] * LAYERS


def test_bad_input(video: Video) -> None:
    model, plan, steps = video.model, video.plan(lambda mask: mask), {"scheduler": video.scheduler}
    with pytest.raises(ValueError, match=r"model must be a CogVideoXTransformer3DModel or Wan.*, got Linear"):
        apply_paro(nn.Linear(1, 1), plan)
    with pytest.raises(ValueError, match="plan must be for the model's 2 layers of 2 heads, got 2 of 1"):
        apply_paro(model, replace(plan, orders=plan.orders[..., :1]))
    with pytest.raises(ValueError, match="scheduler be given if there are several, got 2 and None"):
        apply_paro(model, video.plan(lambda mask: mask, buckets=2))
    with pytest.raises(ValueError, match="scheduler be given if there are several, got 0 and None"):
        record_attention(model, print, buckets=0)
    with apply_paro(model, plan), pytest.raises(ValueError, match="already exists"):
        apply_paro(model, plan)
    with (
        apply_paro(model, replace(plan, grid=(4, 10, 9))),
        pytest.raises(ValueError, match=r"the plan's grid \(4, 10, 9\) and text ., got \(4, 9, 10\) and"),
    ):
        video()
    with (
        record_attention(model, print, buckets=2, **steps),
        pytest.raises(ValueError, match="timestep must be one of the 4 of scheduler, got 1234"),
    ):
        model(timestep=torch.tensor([1234, 1234]), **video.inputs)
    with pytest.raises(ValueError, match=r"generate must run all layers in each of buckets 0 ... 1, got \[1\]"):
        calibrate_model(model, lambda: video(3), density=0.5, buckets=2, **steps)
    video.blocks[1].attn1.set_processor(lambda *_, **__: None)  # such as one that calls another kernel
    with apply_paro(model, plan), pytest.raises(RuntimeError, match=r"layer 1 must call .* once, got 0 calls"):
        video()


def test_masks_are_refused() -> None:
    video = Video(cogvideox)
    mask = {"attention_mask": torch.zeros(2 * HEADS, 1, TEXT + 360)}
    with (
        apply_paro(video.model, video.plan(lambda mask: mask)),
        pytest.raises(ValueError, match=r"self-attention must have no mask.*got attn_mask"),
    ):
        video(attention_kwargs=mask)


@pytest.mark.parametrize("make", [cogvideox, wan])
def test_a_pipeline(make: Callable[[], nn.Module]) -> None:
    """From the prompt's embedding to latents, in four steps and two buckets."""
    pytest.importorskip("transformers", reason="the pipelines need transformers")
    video = Video(make)
    parts = {"tokenizer": None, "text_encoder": None, "vae": None, "transformer": video.model}
    if make is cogvideox:
        pipe = diffusers.CogVideoXPipeline(**parts, scheduler=video.scheduler)
    else:
        pipe = diffusers.WanPipeline(**parts, scheduler=video.scheduler)
    pipe.set_progress_bar_config(disable=True)
    prompt = {"prompt_embeds": torch.randn(1, TEXT, 16), "negative_prompt_embeds": torch.randn(1, TEXT, 16)}

    def sample() -> Tensor:
        return pipe(
            **prompt,
            height=144,
            width=160,
            num_frames=13,
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).frames

    stock = sample()
    plan = calibrate_model(video.model, sample, density=1.0, buckets=2, scheduler=pipe.scheduler)
    assert plan.grid == GRID
    with apply_paro(video.model, plan, scheduler=pipe.scheduler):
        assert relative_error(sample(), stock.double()) < 1e-5
    assert torch.equal(sample(), stock)


def test_skipped_layers_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    video = Video(wan)
    monkeypatch.setattr(video.blocks[1], "forward", lambda hidden_states, *_: hidden_states)  # as a cache does
    with pytest.raises(ValueError, match=r"must run all layers in each of buckets 0 ... 0, got \[\]"):
        calibrate_model(video.model, video, density=0.5)
