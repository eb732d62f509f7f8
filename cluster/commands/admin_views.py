"""What an operator sees in the terminal: the system's state, and what a rebalance would move and gain."""

from collections import defaultdict

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.byte_count import format_bytes
from cluster.commands.views import processes_view
from cluster.controller.process import ClusterStatus, ProcessState, Quarantine, RoleName
from cluster.controller.rebalance import RebalanceState, RebalanceStatus
from protos import admin_pb2


def status_view(status: ClusterStatus) -> RenderableType:
    """One line a process, then what is served and how far a rebalance is."""
    verdict = Text(_verdict(status), style="green" if status.is_serving else "yellow")
    verdict.append(f", placement version {status.placement_version}", style="default")
    quarantines = [
        Text(f"{name}: {quarantine_line(quarantine)}", style="red")
        for name, health in status.processes
        for quarantine in health.quarantines
    ]
    return Group(
        processes_view(status), Text(), *quarantines, verdict, Text(f"rebalance: {rebalance_line(status.rebalance)}")
    )


def _verdict(status: ClusterStatus) -> str:
    """Requests are answered while a worker and a gateway are ready; what else is away is told."""
    if status.is_serving:
        return "serving"
    ready = {name for name, health in status.processes if health.state is ProcessState.READY}
    missing = [name for name, _ in status.processes if name not in ready]
    has_both = all(any(name.startswith(role) for name in ready) for role in (RoleName.WORKER, RoleName.GATEWAY))
    return f"serving without {', '.join(missing)}" if missing and has_both else "not serving"


def quarantine_line(quarantine: Quarantine) -> str:
    """What is not trusted, and why."""
    what = f"shard {quarantine.ep_rank}"
    if quarantine.layer_id is not None:
        what = f"unit {quarantine.unit_id} of layer {quarantine.layer_id} on {what}"
    return f"{what} is quarantined: {quarantine.reason}"


def rebalance_line(status: RebalanceStatus) -> str:
    """The rebalance under way, and how those before it ended."""
    now = status.state.value
    if status.state is not RebalanceState.IDLE:
        now += f" version {status.target_version}"
    if status.state is RebalanceState.STAGING and status.planned_bytes:
        share = status.moved_bytes / status.planned_bytes
        now += f", {format_bytes(status.moved_bytes)} of {format_bytes(status.planned_bytes)} ({share:.0%})"
    why_latest = ""
    if status.reason and status.state is RebalanceState.IDLE:
        why_latest = f" ({status.reason})"
    elif status.reason:
        now += f", {status.reason}"
    parts = [now, f"{status.num_done} done, {status.num_aborted} aborted"]
    if status.seconds_since_success is not None:
        parts.append(f"latest success {format_seconds(status.seconds_since_success)} ago")
    if status.last_result:
        parts.append(f"latest: {status.last_result}{why_latest}")
    return "; ".join(parts)


def plan_view(plan: admin_pb2.RebalanceResponse) -> RenderableType:
    """What each shard reads, what that gains, and whether it would be done without being asked."""
    versions = f"{plan.old_placement_version} → {plan.new_placement_version}"
    title = Text(f"rebalance: placement version {versions}", style="italic")
    verdict = Text("worth it by itself: ", style="bold")
    verdict.append("yes, " if plan.is_worth_it else "no, ", style="green" if plan.is_worth_it else "yellow")
    verdict.append(plan.reason, style="default")
    if not plan.moves:
        return Group(Text("no shard has anything to read"), verdict)
    return Group(title, _moves_table(plan), Text(), _figures_table(plan), verdict)


def _moves_table(plan: admin_pb2.RebalanceResponse) -> RenderableType:
    num_bytes, num_units = defaultdict[int, int](int), defaultdict[int, int](int)
    for move in plan.moves:
        num_bytes[move.ep_rank] += move.num_bytes
        num_units[move.ep_rank] += 1
    table = Table()
    for heading in ("shard", "units in", "bytes in"):
        table.add_column(heading, justify="right", no_wrap=True)
    for ep_rank in sorted(num_bytes):
        table.add_row(str(ep_rank), f"{num_units[ep_rank]:,}", format_bytes(num_bytes[ep_rank]))
    table.add_section()
    table.add_row("all", f"{len(plan.moves):,}", format_bytes(plan.moved_bytes))
    return table


def _figures_table(plan: admin_pb2.RebalanceResponse) -> RenderableType:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(style="dim")
    table.add_row(
        "balancedness",
        f"{plan.balancedness_before:.3f} → {plan.balancedness_after:.3f}",
        "mean over maximum of the shards' load; 1 is perfect",
    )
    table.add_row(
        "experts' time",
        f"x {plan.step_time_ratio:.3f} ({plan.step_time_ratio - 1:+.1%})",
        "of a step, expected from each layer's hottest shard",
    )
    table.add_row("counted from", f"{plan.num_tokens:,}", "assignments of late")
    return table


def format_seconds(seconds: float) -> str:
    """A duration in the largest whole units that say enough."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
