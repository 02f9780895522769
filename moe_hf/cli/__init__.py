"""The command `moe-hf`: upcycle a checkpoint, verify it, look into it, operate on its experts, share it.

Torch and transformers are imported inside the commands, so that help and mistakes in the arguments answer at once.
"""

from moe_hf.cli import (
    card,
    doctor,
    experts,
    export,
    hub,
    inspect,
    launch,
    plan,
    report,
    serve,
    surgery,
    upcycle,
    verify,
)
from moe_hf.cli.app import app, main


__all__ = ["app", "main"]

# Of commands that hand over, with what they do not know themselves.
_HAND_OVER = {"allow_extra_args": True, "ignore_unknown_options": True}

# In the order of the help.
for _name, _command in (
    ("upcycle", upcycle.upcycle),
    ("verify", verify.verify),
    ("inspect", inspect.inspect),
    ("doctor", doctor.doctor),
    ("plan", plan.plan),
    ("report", report.report),
    ("card", card.card),
    ("export", export.export),
    ("import", export.import_),
    ("grow-experts", surgery.grow_experts),
    ("add-experts", surgery.add_experts),
    ("remove-experts", surgery.remove_experts),
    ("replace-experts", surgery.replace_experts),
    ("to-dense", surgery.to_dense),
    ("score-experts", experts.score_experts),
    ("select-experts", experts.select_experts),
    ("merge-deltas", experts.merge_deltas),
    ("push", hub.push),
    ("pull", hub.pull),
):
    app.command(_name)(_command)

for _name, (_program, _summary) in launch.PROGRAMS.items():
    # `--help` is an option of theirs, which shows the program's too.
    app.command(_name, context_settings=_HAND_OVER, add_help_option=False)(launch.launched(_name, _program, _summary))

app.command("serve", context_settings=_HAND_OVER)(serve.serve)
