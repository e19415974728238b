"""Write docs/models.md: what the backend does with each model of tests/zoo.py, on two CPU ranks.

    python docs/make_models.py
    python docs/make_models.py --kept rows.json --seconds 3000      # and again, until it writes the page

With ``--kept``, a file keeps the rows that are made, and the next call makes those that are missing. Rows of other versions of PyTorch
or transformers are made again; after a change of the backend, delete the file.
"""

import argparse
import functools
import inspect
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

TEMPLATE = '''# Models

<!-- Made by docs/make_models.py: edit that, and run it again. -->

## What the backend does with each

Tiny checkpoints of transformers {transformers}, two layers each, loaded with `tp_plan="auto"` on {ranks} ranks, compiled with PyTorch
{torch}. Nothing of a model is changed.

- *sites*: all-reduces that are fused with their add and norm, of all that the model has; and the number of sites, where two
  all-reduces become one.
- *one*, *batch*: `weave` if the sites of one sequence, or of a batch of three, are cut and overlapped. The number of unsplit ops
  between the first and the last site, if there are any.
- *float32*: the relative distance of the logits from eager PyTorch's on the same ranks.
- *bfloat16*: their error against float64 on one rank, divided by eager PyTorch's error. Below 1 is better than eager.
- *verify*: the largest relative difference at a site that `tw_compile.verify` finds, in float32.

{table}

### Why not more

{notes}

## Quantised models

Llamas in FP8, int8 and int4, with their sites, unsplit ops and errors against the dequantised weights in float64, are in
[Quantised models](quantised.md#torchao).

## Generation

A prompt of a padded batch, then single tokens. Greedy, in float32, compiled without a graph break. The graphs of single tokens are
`off`: over the process group a graph that is not woven stays Inductor's own.

{generation}

Each half writes its rows to a cache in turn, so nothing is concatenated. A static cache is written in place. A dynamic one grows by
concatenation.

One sequence behind a cache, such as a prompt in chunks, is cut along its tokens if the mask shows that the first half does not
attend to what the second half writes. It does for a dynamic cache that grows by all tokens. In these cases it does not, and
both halves wait for both writes; the report names an unsplit op with this reason:

- a static cache of transformers {transformers}, which counts its length in a tensor for each layer, while the mask uses that of
  the first layer. `generate` also makes the mask of a static cache outside of the model;
- a sliding window behind a cache;
- gpt-fast's `model.py`, whose mask is a buffer, an input of the graph.

## An op that has no rule

An op without a token-axis rule runs on all tokens where its inputs are cut: an *unsplit op*. The result is right, and overlap is
lost. If the result for each token depends on that token only, register a rule. A rule gets the call and the axes along which its
inputs are cut. It returns how to call the op for a half, or None if that is not possible. Here `shift` takes `x`
[batch, tokens, H], and `by` [batch, tokens], which need not be cut:

```python
{rule}
```

A key of `slices`, or an entry of `whole` (inputs that both halves need whole), is a node; or, where one tensor may be given twice
with different meanings, a place in the call: a position, (position, index) in a list, or a keyword. What a rule returns is
checked against the sizes and the dtype of the whole. A rule that raises, or whose answer does not hold, makes an unsplit op.

## A custom all-reduce

Register a custom op that returns the sum over the ranks of a group, and does not change its input, with a function that reads a
call of it:

```python
{all_reduce}
```

Its sites are then those of PyTorch's own all-reduce, and use the backend's transports: the op itself is no longer called. Both
examples are tests, in `tests/test_extending.py`.

## A model that is not here

`print(tw_compile.explain(model, ids))` shows each of its all-reduces, as a site or as a refusal with the reason, and its graph
breaks. To add it to the table above, add it to `MODELS` in `tests/zoo.py`, with what you expect, and run
`python docs/make_models.py`.
'''

GENERATED = "Llama", "Mistral", "Gemma 3", "Mixtral"

NOTES = {
    "the reduced value has 4 users": "their norms follow attention and MLP. The sum of the embedding has no norm to be fused with: q, k, v "
    "and the first residual read it",
    "aten.sort.default": "with so few tokens experts run on all of them: a half would read the weights of all experts for too few rows. "
    "With more tokens each half sorts its own. Attention, router and both all-reduces are cut in either form",
    "aten.convolution.default": "the linear attention of one sequence reads the tokens before each token. A batch is cut between sequences",
}  # fmt: skip


def main():
    import transformers
    import zoo
    from ranks import Ranks

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kept", type=Path, help="a file that keeps the rows that are made")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no row is begun after so long")
    args = parser.parse_args()
    until = time.monotonic() + args.seconds
    versions = [torch.__version__, transformers.__version__]
    kept = json.loads(args.kept.read_text()) if args.kept and args.kept.exists() else {}
    kept = kept if kept.get("versions") == versions else {"versions": versions}
    wanted = {name: (model, name) for name in zoo.MODELS}
    wanted |= {f"{name}, {cache} cache": (generated, name, cache) for name in GENERATED for cache in ("static", "dynamic")}
    ranks, folder = Ranks(2, timeout=300), tempfile.mkdtemp()
    for key, (make, *of) in wanted.items():
        if key not in kept and time.monotonic() < until:
            kept[key] = make(ranks, folder, *of)
            if args.kept:
                args.kept.write_text(json.dumps(kept, indent=1))
    ranks.stop()
    if missing := [key for key in wanted if key not in kept]:
        print(f"{len(missing)} of {len(wanted)} rows are missing, and docs/models.md is as it was:", *missing, sep="\n")
        return
    table = [("model", "sites", "one", "batch", "float32", "bfloat16", "verify")]
    generation = [("model", "cache", "graphs", "unsplit ops", "same tokens", "bfloat16")]
    why = {}
    for key, (make, name, *_) in wanted.items():
        (table if make is model else generation).append(kept[key]["row"])
        for reason in kept[key]["why"]:
            why.setdefault(reason, []).append(name)

    import test_extending as examples

    text = TEMPLATE.format(
        transformers=transformers.__version__, torch=torch.__version__.split("+")[0], ranks=2,
        table=rows(table), generation=rows(generation),
        notes="\n".join(f"- {', '.join(names)}: {NOTES[reason]}." for reason, names in why.items() if reason in NOTES),
        rule=body(examples.test_an_op_with_a_rule_stays_cut, "assert"),
        all_reduce=body(examples.test_an_all_reduce_of_ones_own_is_a_site, "(match,)"),
    )  # fmt: skip
    (HERE / "models.md").write_text(text)


def model(ranks, folder, name) -> dict:
    """A model's row, and why not more of it is a site or cut."""
    import zoo

    path = zoo.make(name, folder)
    one = ranks(zoo.forward, path)[0]
    batch = ranks(zoo.forward, path, 3, 32, False, torch.bfloat16)[0]
    reports = one.reports[-1], batch.reports[-1]
    found = sum(site.merged for site in reports[0].sites)
    sites = f"{found} of {found + len(reports[0].refusals)}"
    sites += f", in {len(reports[0].sites)}" if found > len(reports[0].sites) else ""
    ratio = f"{batch.error / batch.eager_error:.2f}"
    verified = f"{ranks(zoo.verified, path)[0]:.0e}"
    why = dict.fromkeys(r.reason.split(" (")[0] for report in reports for r in report.refusals)
    why |= dict.fromkeys(j.op for report in reports for j in report.joins)
    return {"row": [name, sites, *map(mode, reports), f"{one.difference:.0e}", ratio, verified], "why": [*why]}


def generated(ranks, folder, name, cache) -> dict:
    """A row of a model that generates."""
    import zoo

    greedy = functools.partial(zoo.generate, do_sample=False)
    wide, half = (ranks(greedy, zoo.make(name, folder), cache, dtype)[0] for dtype in (torch.float32, torch.bfloat16))
    modes = " + ".join(report.mode for report in wide.reports)
    same = "yes" if torch.equal(wide.tokens, wide.eager_tokens) else "no"
    ratio = f"{half.error / half.eager_error:.2f}"
    return {"row": [name, cache, modes, str(len(wide.reports[0].joins)), same, ratio], "why": []}


def mode(report) -> str:
    return report.mode + (f", {len(report.joins)} unsplit ops" if report.joins else "")


def rows(table) -> str:
    head, *rest = table
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rest))


def body(function, until) -> str:
    """The source of a function's body, up to the line that begins with ``until``."""
    lines = inspect.cleandoc("\n" + "".join(inspect.getsourcelines(function)[0][1:])).splitlines()
    end = next(i for i, line in enumerate(lines) if line.startswith(until))
    return "\n".join(lines[:end]).strip()


if __name__ == "__main__":
    main()
