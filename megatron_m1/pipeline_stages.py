"""Which layers each pipeline stage holds, in Megatron's letters: E embedding, t a layer, L head."""

from __future__ import annotations

import re

from parallel.layout import Layout


def stages(layout: Layout, num_layers: int) -> list[str]:
    """One string a (virtual) stage in the order of the layers: ``["Ett", "ttL"]``.

    Stage i is on pipeline rank i modulo pp. ``layout.pipeline_layout`` is expanded as Megatron's
    ``PipelineParallelLayerLayout`` does it; without one the layers are cut evenly.
    """
    if layout.pipeline_layout is None:
        count = layout.pp * (layout.vpp or 1)
        parts = ["t" * (num_layers // count)] * count
        parts[0] = "E" + parts[0]
        parts[-1] += "L"
        return parts
    text = layout.pipeline_layout.replace(",", "")
    for repeated in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        text = re.sub(repeated, lambda found: found[1] * int(found[2]), text)
    return text.split("|")
