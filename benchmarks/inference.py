"""What an answer costs: tower, controller, relation map, aggregation, projector, prefill, decode step, first token.

    python benchmarks/inference.py > benchmarks/results/inference.md

A question of a few tokens about one image, on random weights: nothing that is timed depends on their values, since the
clustering runs a fixed number of rounds. The parts are those of docs/method.md; progress goes to stderr.
"""

import torch
from settings import PATCH, SHAPES, add_shapes, build, parse, parser

from granulon.evaluation.timing import interleaved, machine, medians, milliseconds
from granulon.hub.text import markdown_table
from modeling_granulon import GranulonForConditionalGeneration
from modeling_granulon.image_tokens import VIEWS
from modeling_granulon.vision_features import COLUMN_STRIDE, RelationMap, rotate, vision_features

BEFORE, QUESTION, AFTER = 4, 12, 5  # tokens of the prompt around the image, as a chat template writes it
PREFACE = f"""\
# Inference, part by part

{{machine}}, {{dtype}}; {{clock}}, medians of {{rounds}} interleaved rounds; one image, random weights.

- The prompt is {BEFORE} tokens, the image, a question of {QUESTION} tokens and {AFTER} more. The semantic view shows
  all its slots, as the finest level fills them.
- "Front end" is controller, relation map and AdaTA; its shares are of tower and prefill of the full view together.
- "First token" is `generate` from pixels to the first token at the finest level: all parts, each once.
- On a CPU the model runs in float32: without a matrix unit, bfloat16 products are slower there. On CUDA, bfloat16."""
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


def text_parts(head: GranulonForConditionalGeneration, size: int) -> tuple[dict, dict[str, int]]:
    """The prefill and a decode step after it, per view, as `generate` runs them; and the length of each prompt."""
    config, patches = head.config, (size // PATCH) ** 2
    slots = {"full": patches + config.max_semantic_tokens, "pixel": patches, "semantic": config.max_semantic_tokens}
    prefills, steps, lengths = {}, {}, {}
    for view in VIEWS:
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


def shares(seconds: dict[str, float], levels: list[str]) -> dict[str, float]:
    """The front end of each level, against tower and prefill of the full view."""
    prefill = seconds["tower"] + seconds["prefill, full"]
    return {level: sum(seconds[part] for part in parts_of(level)) / prefill for level in levels}


def parts_of(level: str) -> list[str]:
    """The front end."""
    return ["controller", "relation map", f"AdaTA, {level}"]


def verdicts(size: int, seconds: dict[str, float], lengths: dict[str, int], levels: list[str]) -> list[str]:
    """The goals at this size, each met or with the reason why not."""
    largest, smallest = GOALS[size]
    by_level = shares(seconds, levels)
    level = max(levels, key=by_level.get)
    share = f"{size} px: the front end takes {by_level[level]:.2%} ({level}), goal {largest:.0%}"
    if by_level[level] <= largest:
        share += ": met."
    else:
        slowest = max(parts_of(level), key=seconds.get)
        allowed = largest * (seconds["tower"] + seconds["prefill, full"])
        share += (
            f": not met. {slowest} alone takes {milliseconds(seconds[slowest])} ms, and the goal leaves "
            f"{milliseconds(allowed)} ms for all of them."
        )
    faster = seconds["prefill, full"] / seconds["prefill, semantic"]
    ratio = f"{size} px: the semantic view's prefill is {faster:.1f}x faster than the full one's, goal {smallest}x"
    if faster >= smallest:
        ratio += ": met."
    else:
        reading = seconds["decode step, semantic"] / seconds["prefill, semantic"]
        ratio += (
            f": not met. Its prompt is {lengths['full'] / lengths['semantic']:.1f}x shorter, but one token alone, "
            f"that is reading the weights, takes {reading:.0%} of its time."
        )
    first = first_token_ratio(seconds, "semantic")
    end = f"{size} px: from pixels, the semantic view's first token comes {first:.1f}x faster, goal never slower"
    return [share, ratio, end + (": met." if first >= 1 else ": not met.")]


def report(sizes: list[int], results: list[tuple[dict[str, float], dict[str, int]]], levels: list[str]) -> str:
    """Two Markdown tables: the time of each part, and the ratios."""
    header = [f"{size} px" for size in sizes]
    parts = [[part, *(milliseconds(seconds[part]) for seconds, _ in results)] for part in results[0][0]]
    ratios = [[f"prompt tokens, {view}", *(lengths[view] for _, lengths in results)] for view in VIEWS]
    for level in levels:
        row = [f"{shares(seconds, levels)[level]:.2%}" for seconds, _ in results]
        ratios.append([f"front end, {level}: share of tower and prefill", *row])
    for view in VIEWS[1:]:
        row = [f"{seconds['prefill, full'] / seconds[f'prefill, {view}']:.1f}x" for seconds, _ in results]
        ratios.append([f"prefill of the language model, full / {view}", *row])
        row = [f"{first_token_ratio(seconds, view):.1f}x" for seconds, _ in results]
        ratios.append([f"first token from pixels, full / {view}", *row])
    return markdown_table(["milliseconds", *header], parts) + "\n\n" + markdown_table(["ratio", *header], ratios)


def first_token_ratio(seconds: dict[str, float], view: str) -> float:
    """How many times faster than the full view a view's first token comes."""
    return seconds["first token, full"] / seconds[f"first token, {view}"]


@torch.no_grad()
def measure(name: str, sizes: list[int], head: GranulonForConditionalGeneration, **timing) -> str:
    """The Markdown section of one model."""
    levels, results = head.config.granularity_names, []
    for size in sizes:
        calls, lengths = text_parts(head, size)
        calls = visual_parts(head, size) | calls | first_token_parts(head, size)
        results.append((medians(interleaved(calls, device=head.device, **timing)), lengths))
    section = f"## {name.capitalize()} shapes: {SHAPES[name][0]}\n\n{report(sizes, results, levels)}"
    if name == "large" and GOALS.keys() & set(sizes):
        lines = [verdicts(size, *result, levels) for size, result in zip(sizes, results) if size in GOALS]
        section += "\n\n" + "\n".join(f"- {line}" for of_size in lines for line in of_size)
    return section


def main() -> None:
    made = parser(__doc__, rounds=3)
    add_shapes(made, "tiny and large", [224, 448, 896])
    options = parse(made)
    dtype_name = str(options.dtype).removeprefix("torch.")
    print(
        PREFACE.format(
            machine=machine(options.device), dtype=dtype_name, clock=options.clock_name, rounds=options.rounds
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
