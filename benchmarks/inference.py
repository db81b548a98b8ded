"""What an answer costs: tower, controller, relation map, aggregation, projector, prefill, decode step, first token.

    python benchmarks/inference.py > benchmarks/results/inference.md

A question of a few tokens about one image, on random weights: nothing that is timed depends on their values, since the
clustering runs a fixed number of rounds. The parts are those of docs/method.md; progress goes to stderr.
"""

import numpy as np
import torch
from settings import PATCH, SHAPES, add_shapes, build, command_line, parse, parser

from granulon.evaluation.timing import interleaved, machine, milliseconds, peak_bytes, times, with_quartiles
from granulon.hub.text import markdown_table
from modeling_granulon import GranulonForConditionalGeneration
from modeling_granulon.image_tokens import VIEWS
from modeling_granulon.vision_features import COLUMN_STRIDE, RelationMap, rotate, vision_features

BEFORE, QUESTION, AFTER = 4, 12, 5  # tokens of the prompt around the image, as a chat template writes it
PREFACE = f"""\
# Inference, part by part

`{{command}}`: {{machine}}, {{dtype}}; {{clock}}, medians and quartiles of {{rounds}} interleaved
rounds, ratios within a round; one image, random weights.

- The prompt is {BEFORE} tokens, the image, a question of {QUESTION} tokens and {AFTER} more. The semantic view shows
  all its slots, as the finest level fills them.
- "Front end" is controller, relation map and AdaTA; its shares are of tower and prefill of the full view together.
- "First token" is `generate` from pixels to the first token at the finest level: all parts, each once.
- "Peak" is the most that tensors hold at once until the first token, beyond weights and inputs.
- On a CPU the model runs in float32, on CUDA in bfloat16."""
FRONT_END, PREFILL, FIRST = ("controller", "relation map"), "prefill", "first token"
SHARE = "front end, {}: share of tower and prefill"
GOALS = {224: (0.01, 3), 448: (0.01, 10), 896: (0.02, 45)}  # pixels: the largest share, the smallest ratio


def visual_parts(head: GranulonForConditionalGeneration, size: int) -> dict:
    """The calls that turn an image and its question into image tokens, on what the part before each gives."""
    model, config = head.model, head.config
    pixels = torch.rand(1, 3, size, size, device=head.device, dtype=head.dtype)
    vision = vision_features(model.vision_tower, pixels)
    cos_NC, sin_NC = model.vision_tower.rope_embeddings(pixels)
    question = torch.randint(config.image_token_id, (1, QUESTION), device=head.device)
    finest_1 = torch.tensor([len(config.granularities) - 1], device=head.device)

    def relation() -> torch.Tensor:
        query, key = (rotate(x, cos_NC, sin_NC) for x in (vision.relation.query, vision.relation.key))
        return RelationMap(query, key, vision.relation.scale, vision.grid).profiles(COLUMN_STRIDE)

    attention = relation()

    def aggregate(level: dict):
        return model.aggregation(
            vision.features, attention, level["stride"], level["clusters"], vision.grid, top_k=level["keep"]
        )

    semantic = aggregate(config.granularities[-1])

    def project():
        model.multi_modal_projector(vision.features, finest_1)
        model.multi_modal_projector(semantic.tokens, finest_1, semantic.geometry)

    calls = {
        "tower": lambda: model.vision_tower(pixels),
        "controller": lambda: model.question_logits(question),
        "relation map": relation,
    }
    calls |= {f"AdaTA, {level['name']}": lambda level=level: aggregate(level) for level in config.granularities}
    return calls | {"projector": project}


def first_token_parts(head: GranulonForConditionalGeneration, size: int) -> dict:
    """`generate` of one token from the pixels, per view of the same full prompt."""
    config = head.config
    slots = (size // PATCH) ** 2 + config.max_semantic_tokens
    ids = torch.randint(config.image_token_id, (1, BEFORE + slots + QUESTION + AFTER), device=head.device)
    ids[:, BEFORE : BEFORE + slots] = config.image_token_id
    question = ids[:, BEFORE + slots : BEFORE + slots + QUESTION]
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "question_input_ids": question,
        "question_attention_mask": torch.ones_like(question), "granularity": len(config.granularities) - 1,
        "pixel_values": torch.rand(1, 3, size, size, device=head.device, dtype=head.dtype),
        "max_new_tokens": 1, "do_sample": False,
    }  # fmt: skip
    return {f"first token, {view}": lambda view=view: head.generate(**inputs, visual_view=view) for view in VIEWS}


def text_parts(head: GranulonForConditionalGeneration, size: int, views=VIEWS) -> tuple[dict, dict[str, int]]:
    """The prefill and a decode step after it, per view, as `generate` runs them; and the length of each prompt."""
    config, patches = head.config, (size // PATCH) ** 2
    slots = {"full": patches + config.max_semantic_tokens, "pixel": patches, "semantic": config.max_semantic_tokens}
    prefills, steps, lengths = {}, {}, {}
    for view in views:
        ids = torch.randint(config.image_token_id, (1, BEFORE + slots[view] + QUESTION + AFTER), device=head.device)
        ids[:, BEFORE : BEFORE + slots[view]] = config.image_token_id
        embeds = torch.randn(1, slots[view], config.text_config.hidden_size, device=head.device, dtype=head.dtype)
        mask = torch.ones_like(ids)
        prompt = {"input_ids": ids, "image_embeds": embeds, "attention_mask": mask, "logits_to_keep": 1}
        cache = head(**prompt).past_key_values
        longer = torch.cat([mask, mask[:, :1]], dim=1)
        token = {"input_ids": ids[:, :1], "attention_mask": longer, "past_key_values": cache, "logits_to_keep": 1}

        def step(token=token):
            head(**token)
            token["past_key_values"].crop(-1)

        prefills[f"prefill, {view}"] = lambda prompt=prompt: head(**prompt)
        steps[f"decode step, {view}"] = step
        lengths[view] = ids.shape[1]
    return prefills | steps, lengths


def front_end(seconds: dict, level: str):
    """Controller, relation map and AdaTA at a level."""
    return sum(seconds[part] for part in FRONT_END) + seconds[f"AdaTA, {level}"]


def ratios_of(seconds: dict, levels: list[str]) -> dict:
    """The shares of the front end of each level, and how many times faster a view is than the full one."""
    prefill = seconds["tower"] + seconds["prefill, full"]
    found = {SHARE.format(level): front_end(seconds, level) / prefill for level in levels}
    for view in VIEWS[1:]:
        for part in (PREFILL, FIRST):
            found[f"{part}, full / {view}"] = seconds[f"{part}, full"] / seconds[f"{part}, {view}"]
    return found


def verdicts(size: int, seconds: dict[str, float], lengths: dict[str, int], levels: list[str]) -> list[str]:
    """The goals at this size, each met or not, with the medians that decide it."""
    largest, smallest = GOALS[size]
    ratios = ratios_of(seconds, levels)
    level = max(levels, key=lambda level: ratios[SHARE.format(level)])
    share, faster = ratios[SHARE.format(level)], ratios[f"{PREFILL}, full / semantic"]
    first = ratios[f"{FIRST}, full / semantic"]
    longest = max((*FRONT_END, f"AdaTA, {level}"), key=seconds.get)
    allowed = largest * (seconds["tower"] + seconds["prefill, full"])
    return [
        f"{size} px: the front end takes {share:.2%} of tower and prefill ({level}), goal {largest:.0%}: "
        f"{_met(share <= largest)}. The goal leaves {milliseconds(allowed)} ms; {longest} takes "
        f"{milliseconds(seconds[longest])} ms.",
        f"{size} px: full over semantic prefill is {times(faster)}, goal {smallest}x: {_met(faster >= smallest)}. The "
        f"lengths of the prompts have a ratio of {times(lengths['full'] / lengths['semantic'])}; a decode step takes "
        f"{seconds['decode step, semantic'] / seconds['prefill, semantic']:.0%} of the semantic prefill.",
        f"{size} px: full over semantic first token, from pixels, is {times(first)}, goal 1x: {_met(first >= 1)}.",
    ]


def _met(met: bool) -> str:
    return "met" if met else "not met"


def report(sizes: list[int], results: list[tuple[dict, dict, dict]], levels: list[str]) -> str:
    """Two Markdown tables: the time of each part, and the ratios."""
    header = [f"{size} px" for size in sizes]
    parts = [[part, *(with_quartiles(seconds[part]) for seconds, _, _ in results)] for part in results[0][0]]
    rows = [[f"prompt tokens, {view}", *(lengths[view] for _, lengths, _ in results)] for view in VIEWS]
    rows += [[f"peak MB, {name}", *(f"{peaks[name] / 1e6:.1f}" for *_, peaks in results)] for name in results[0][2]]
    ratios = [ratios_of(seconds, levels) for seconds, _, _ in results]
    for name in ratios[0]:
        shown = "{:.2%}".format if name.startswith("front end") else times
        rows.append([name, *(with_quartiles(ratio[name], shown) for ratio in ratios)])
    return (
        markdown_table(["milliseconds", *header], parts)
        + "\n\n"
        + markdown_table(["tokens, memory, ratios", *header], rows)
    )


@torch.no_grad()
def measure(name: str, sizes: list[int], head: GranulonForConditionalGeneration, **timing) -> str:
    """The Markdown section of one model."""
    levels, results = head.config.granularity_names, []
    for size in sizes:
        calls, lengths = text_parts(head, size)
        whole = first_token_parts(head, size)
        seconds = interleaved(visual_parts(head, size) | calls | whole, device=head.device, **timing)
        results.append((seconds, lengths, {name: peak_bytes(call, head.device) for name, call in whole.items()}))
    section = f"## {name.capitalize()} shapes: {SHAPES[name][0]}\n\n{report(sizes, results, levels)}"
    if name == "large":
        for size, (seconds, lengths, _) in zip(sizes, results):
            if size in GOALS:
                medians = {part: float(np.median(values)) for part, values in seconds.items()}
                section += "".join(f"\n\n- {line}" for line in verdicts(size, medians, lengths, levels))
    return section


def main() -> None:
    made = parser(__doc__, rounds=3)
    add_shapes(made, "tiny and large", [224, 448, 896])
    options = parse(made)
    dtype_name = str(options.dtype).removeprefix("torch.")
    print(
        PREFACE.format(
            command=command_line(),
            machine=machine(options.device),
            dtype=dtype_name,
            clock=options.clock_name,
            rounds=options.rounds,
        )
    )
    for name in options.model or ["tiny", "large"]:
        image_token_id = SHAPES[name][2]["vocab_size"] - 1
        head = build(name, options.device, options.dtype, image_token_id).eval()
        head.generation_config.pad_token_id = 0
        section = measure(name, options.sizes, head, rounds=options.rounds, clock=options.clock)
        print("\n" + section, flush=True)


if __name__ == "__main__":
    main()
