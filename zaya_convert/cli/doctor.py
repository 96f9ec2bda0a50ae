"""``doctor``: what is there, what is in use, and why."""

from __future__ import annotations

from typing import Any

import click

from zaya_convert.cli.output import Output, output_options, size, table


@click.command("doctor")
@click.option("--clear-cache", is_flag=True, help="Only delete the packed matrices that are kept.")
@output_options
def command(clear_cache: bool, out: Output) -> None:
    """Show versions, optional packages, devices, native code and kernels in use, and why."""
    if clear_cache:
        from zaya_convert.runtime.packed_cache import clear

        freed = clear()
        out.result({"freed_bytes": freed}, f"{size(freed)} freed")
        return
    from zaya_convert.doctor import examine

    facts = examine()
    out.result(facts, _text(facts))


def _text(facts: dict[str, Any]) -> str:
    cpu, native = facts["cpu"], facts["native"]
    memory = size(cpu["memory_bytes"]) if cpu["memory_bytes"] else "unknown memory"
    packages = ", ".join(
        f"{name} {found or 'MISSING'}" for name, found in facts["packages"].items()
    )
    features = " ".join(cpu["features"]) or "no known features"
    rows = [
        ("zaya-convert", f"{facts['zaya_convert']}, Python {facts['python']}, {facts['platform']}"),
        ("packages", packages),
        *(("extra " + extra["name"], _extra(extra)) for extra in facts["extras"]),
        ("cpu", f"{cpu['cores']} cores, {memory}, {features}"),
        *(("device " + device["name"], _device(device)) for device in facts["devices"]),
        ("quantizer", f"native code, {native['isa']}" if native["available"]
         else f"torch reference: {native['detail']}"),
        *((f"kernel {row['op']}", f"{row['weights']}, {row['kernel']}: {row['status']}")
          for row in facts["kernels"]),
        ("bundled model", "yes" if facts["bundled_checkpoint"] else "MISSING: name a MODEL"),
        ("recipes", ", ".join(facts["recipes"]) or "MISSING"),
        ("packed matrices", f"{size(facts['cache']['bytes'])} in {facts['cache']['folder']}"
         if facts["cache"]["folder"] else "not kept"),
        ("free disk here", size(facts["free_bytes"])),
    ]  # fmt: skip
    return table(rows)


def _extra(extra: dict[str, Any]) -> str:
    found = ", ".join(f"{name} {known or 'missing'}" for name, known in extra["packages"].items())
    return f"{found}; {extra['install']}" if extra["install"] else found


def _device(device: dict[str, Any]) -> str:
    memory = f", {size(device['memory_bytes'])}" if "memory_bytes" in device else ""
    return device["detail"] + memory
