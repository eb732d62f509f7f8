"""Writes the Grafana boards beside it, from what is said here: python k8s/components/monitoring/boards/generate.py

Needs the extra `boards`. The JSON is committed and a test compares; change it here, never by hand.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from grafana_foundation_sdk.builders import bargauge, dashboard, prometheus, stat, statushistory, table, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import ReduceDataOptions
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    DataTransformerConfig,
    FieldColor,
    FieldColorModeId,
)

SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")
# Marks of rebalances, by why they were begun: name and colour.
CAUSES = {
    "by_hand": ("by hand", "blue"),
    "gain": ("saves time", "purple"),
    "added": ("shard added", "green"),
    "drained": ("shard drained", "yellow"),
    "lost": ("shard lost", "red"),
}
WIDTH = 24
HEIGHT = 8
PANELS = {
    "lines": timeseries.Panel,
    "number": stat.Panel,
    "bars": bargauge.Panel,
    "rows": statushistory.Panel,
    "table": table.Panel,
}


class Panel(NamedTuple):
    """queries: (PromQL, legend). unit: Grafana's name of one. `width` of 24 columns."""

    title: str
    queries: Sequence[tuple[str, str]]
    unit: str = "short"
    kind: str = "lines"
    text: str = ""
    width: int = 8
    maximum: float | None = None


def rate(name: str, by: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({name}[$__rate_interval]))"


def quantile(part: float, name: str, by: str = "") -> str:
    return f"histogram_quantile({part}, {rate(f'{name}_bucket', f'le, {by}' if by else 'le')})"


def quantiles(name: str, parts: Sequence[float] = (0.5, 0.95, 0.99)) -> list[tuple[str, str]]:
    return [(quantile(part, name), f"p{100 * part:g}") for part in parts]


def largest(term: str) -> str:
    return f'max(mobula_balance_{term}_term{{statistic="max"}})'


EXPERTS = [
    Panel(
        "Balancedness",
        [
            ("mobula_expert_load_total_balancedness", "all layers"),
            ("min(mobula_expert_load_balancedness)", "worst layer"),
        ],
        "percentunit",
        text="Mean over maximum of the shards' load; 1 is even. A layer of its own may be uneven and cost nothing.",
        maximum=1,
    ),
    Panel(
        "f, f' and f'', the worst layer's",
        [(largest("expert"), "f: expert"), (largest("compute"), "f': shard"), (largest("communication"), "f'': rows")],
        text="The terms of DeepSeek-V2's balance losses as they are now; 1 is even. Of a prompt only one token visits "
        "the last layer, so with few requests its terms are a small sample's.",
    ),
    Panel(
        "Load by shard",
        [(rate("mobula_ep_rank_assignments_total", "ep_rank"), "shard {{ep_rank}}")],
        "cps",
        text="(token, expert) pairs computed a second.",
    ),
    Panel(
        "Hottest expert of each layer, over its mean",
        [('max by (layer) (mobula_balance_expert_term{statistic="max"})', "{{layer}}")],
        kind="rows",
        width=16,
        text="f of each layer's hottest expert. The live map of every expert is on the gateway's dashboard.",
    ),
    Panel(
        "Shards a token visits",
        [(rate("mobula_ranks_per_token_bucket", "le"), "{{le}}")],
        "short",
        "bars",
        text="Cumulative: how many (token, layer) pairs visited at most so many. None is beyond the limit.",
    ),
    Panel(
        "Layers by experts",
        [("max by (layer, expert) (mobula_expert_term)", "")],
        kind="table",
        width=16,
        text="f of every expert. Only with controller.expert_series: true, which costs a series for each.",
    ),
    Panel(
        "Shards a token, mean",
        [
            (f"{rate('mobula_ranks_per_token_sum')} / {rate('mobula_ranks_per_token_count')}", "mean"),
            ("sum(increase(mobula_device_limit_violations_total[$__range]))", "over the limit"),
        ],
    ),
    Panel(
        "Bytes by link",
        [(rate("mobula_dispatch_bytes_total", "ep_rank, direction"), "{{direction}} {{ep_rank}}")],
        "Bps",
    ),
    Panel(
        "Stragglers: a forward's time by shard",
        [
            (
                f"{rate('mobula_forward_seconds_total', 'ep_rank, part')} / on (ep_rank) group_left "
                + rate("mobula_expert_forwards_total", "ep_rank"),
                "{{ep_rank}} {{part}}",
            )
        ],
        "s",
        text="On the shard (queue, compute) or between (wire).",
    ),
    Panel(
        "Quarantined",
        [("max by (ep_rank) (mobula_shard_is_quarantined) or vector(0)", "{{ep_rank}}")],
        kind="bars",
        maximum=1,
    ),
    Panel(
        "Placement version",
        [("mobula_controller_placement_version", "told"), ("min(mobula_placement_version)", "used by all workers")],
    ),
    Panel(
        "Rebalances", [("mobula_rebalances_total", "{{outcome}}")], kind="number", text="Since the controller started."
    ),
    Panel(
        "Bytes that a rebalance reads",
        [("mobula_rebalance_planned_bytes", "planned"), ("mobula_rebalance_moved_bytes", "read")],
        "bytes",
    ),
]
SERVING = [
    Panel("Time to first token", quantiles("mobula_time_to_first_token_seconds"), "s"),
    Panel("Between tokens", quantiles("mobula_inter_token_latency_seconds"), "s"),
    Panel("Whole request", quantiles("mobula_e2e_request_latency_seconds"), "s"),
    Panel(
        "Tokens",
        [(rate("mobula_generation_tokens_total"), "generated"), (rate("mobula_prompt_tokens_total"), "prompt")],
        "cps",
    ),
    Panel(
        "Requests by worker",
        [
            ("mobula_num_requests_running", "running {{dp_rank}}"),
            ("mobula_num_requests_waiting", "waiting {{dp_rank}}"),
        ],
    ),
    Panel("Waiting before the first step", quantiles("mobula_request_queue_time_seconds", (0.5, 0.95)), "s"),
    Panel("Latent cache in use", [("mobula_latent_cache_usage_ratio", "worker {{dp_rank}}")], "percentunit", maximum=1),
    Panel("Preempted", [(rate("mobula_num_preemptions_total", "dp_rank"), "worker {{dp_rank}}")], "cps"),
    Panel("Tokens in a step", quantiles("mobula_iteration_tokens", (0.5, 0.95))),
    Panel("Requests by status", [(rate("mobula_gateway_requests_total", "code"), "{{code}}")], "reqps"),
    Panel(
        "At the gateways",
        [("sum(mobula_gateway_requests_in_flight)", "in flight"), ("sum(mobula_gateway_requests_waiting)", "waiting")],
    ),
    Panel("Ended by", [(rate("mobula_request_success_total", "finish_reason"), "{{finish_reason}}")], "reqps"),
    Panel("A layer's round trip", quantiles("mobula_dispatch_latency_seconds"), "s"),
    Panel("Left out by the overload valve", [(rate("mobula_dropped_assignments_total"), "assignments")], "cps"),
    Panel(
        "Answers that went on with another worker",
        [(rate("mobula_gateway_resumes_total", "reason"), "{{reason}}")],
        "cps",
    ),
]
CLUSTER = [
    Panel("Processes that answer", [("sum by (component) (up)", "{{component}}")], kind="number"),
    Panel("Versions", [("count by (version) (mobula_build_info)", "{{version}}")], kind="number"),
    Panel("Shards", [("mobula_expert_shards", "there are"), ("count(mobula_expert_units)", "answer")], kind="number"),
    Panel("Memory", [("mobula_process_memory_bytes", "{{process}}")], "bytes"),
    Panel("CPU", [(rate("mobula_process_cpu_seconds_total", "process"), "{{process}}")]),
    Panel("Expert weights", [("mobula_expert_weight_bytes", "shard {{ep_rank}}")], "bytes"),
    Panel("Units held", [("mobula_expert_units", "shard {{ep_rank}}")], kind="bars"),
    Panel(
        "Queue of a shard, p95", [(quantile(0.95, "mobula_expert_queue_seconds", "ep_rank"), "shard {{ep_rank}}")], "s"
    ),
    Panel("Computing, p95", [(quantile(0.95, "mobula_expert_compute_seconds", "ep_rank"), "shard {{ep_rank}}")], "s"),
    Panel(
        "Forwards that one computation answered",
        [(f"{rate('mobula_expert_batched_calls_sum')} / {rate('mobula_expert_batched_calls_count')}", "mean")],
    ),
    Panel("Rows sent", [(rate("mobula_dispatch_rows_total", "dp_rank"), "worker {{dp_rank}}")], "cps"),
    Panel("Scrapes", [("scrape_duration_seconds", "{{instance}}")], "s"),
]
BOARDS = {
    "experts": ("Mobula: experts", EXPERTS),
    "serving": ("Mobula: serving", SERVING),
    "cluster": ("Mobula: cluster", CLUSTER),
}


def build(name: str) -> str:
    """A board's JSON."""
    title, panels = BOARDS[name]
    board = (
        dashboard.Dashboard(title)
        .uid(f"mobula-{name}")
        .tags(["mobula"])
        .refresh("10s")
        .time("now-30m", "now")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("source").label("Prometheus").type("prometheus"))
    )
    for cause, (name, color) in CAUSES.items():
        board = board.annotation(
            dashboard.AnnotationQuery()
            .name(f"Rebalance: {name}")
            .datasource(SOURCE)
            .enable(True)
            .icon_color(color)
            .expr(f'increase(mobula_rebalances_begun_total{{cause="{cause}"}}[1m]) > 0')
        )
    for panel in panels:
        board = board.with_panel(_panel(panel))
    return JSONEncoder(sort_keys=True, indent=1).encode(board.build()) + "\n"


def _panel(panel: Panel) -> Builder:
    built = (
        PANELS[panel.kind]()
        .title(panel.title)
        .description(panel.text)
        .datasource(SOURCE)
        .span(panel.width)
        .height(HEIGHT)
        .unit(panel.unit)
    )
    if panel.maximum is not None:
        built = built.min(0).max(panel.maximum)
    dress = DRESS.get(panel.kind)
    built = dress(built) if dress else built
    for number, (expression, legend) in enumerate(panel.queries):
        query = prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(chr(ord("A") + number))
        is_now = panel.kind in ("number", "bars", "table")
        built = built.with_target(query.instant() if is_now else query.range())
    return built


def _lines(panel: timeseries.Panel) -> timeseries.Panel:
    return panel.line_width(1.5).fill_opacity(6)


def _now(panel: stat.Panel) -> stat.Panel:
    return panel.reduce_options(_Options())


def _coloured(panel: statushistory.Panel) -> statushistory.Panel:
    return panel.color_scheme(_Scheme())


def _matrix(panel: table.Panel) -> table.Panel:
    matrix = DataTransformerConfig(
        id_val="groupingToMatrix", options={"columnField": "expert", "rowField": "layer", "valueField": "Value"}
    )
    return panel.with_transformation(matrix).color_scheme(_Scheme())


class _Options(Builder[ReduceDataOptions]):
    def build(self) -> ReduceDataOptions:
        return ReduceDataOptions(calcs=["lastNotNull"], values=False)


class _Scheme(Builder[FieldColor]):
    def build(self) -> FieldColor:
        return FieldColor(mode=FieldColorModeId.CONTINUOUS_BLUES)


DRESS: dict[str, Callable[[Builder], Builder]] = {
    "lines": _lines,
    "number": _now,
    "bars": _now,
    "rows": _coloured,
    "table": _matrix,
}


def main() -> None:
    for name in BOARDS:
        (Path(__file__).parent / f"{name}.json").write_text(build(name), encoding="utf-8")


if __name__ == "__main__":
    main()
