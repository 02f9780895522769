"""The table of docs/chat_templates.md: python -m tests.chat.template_table writes it; with folders of .jinja files it prints theirs."""

import re
import sys
from pathlib import Path

from moe_hf.chat.answer_masks import MARKER, mask_answers
from moe_hf.chat.rendered_chat import UnmarkableChat
from tests.chat.samples import chats, in_parts, learnt, template_files, tokenizer_for, training_template


PAGE = Path(__file__).parents[2] / "docs" / "chat_templates.md"
BEGIN, END = "<!-- table: python -m tests.chat.template_table -->\n", "<!-- end of the table -->\n"
KINDS = ("system", "reasoning", "tools")
HEADER = (
    "template",
    "its own marks",
    "what is learnt of a chat of two turns",
    *KINDS,
    "with TRL's template for training",
)


def rows(files: dict[str, Path]) -> list[tuple[str, ...]]:
    """A row for each template, in the order of `HEADER`."""
    return [_row(name, file) for name, file in files.items()]


def _row(name: str, file: Path) -> tuple[str, ...]:
    text = file.read_text("utf-8")
    trained = training_template(file)
    tokenizer = tokenizer_for(text, *([trained] if trained else []))
    two, _, _ = chats()["two turns"]
    try:
        shown = _shown(learnt(tokenizer, mask_answers(tokenizer, two, use_markers=False)))
    except UnmarkableChat as error:
        try:
            masked = mask_answers(tokenizer, in_parts(two), use_markers=False)
            shown = f"{_shown(learnt(tokenizer, masked))}, `content` being a list"
        except UnmarkableChat:
            shown = f"refused: {error}"
    own = _beside_marks(text, text) if MARKER.search(text) else ""
    beside = _beside_marks(text, trained) if trained else ""
    return (f"`{name}`", own, shown, *(_of_kind(tokenizer, kind) for kind in KINDS), beside)


def _of_kind(tokenizer, kind: str) -> str:
    messages, tools, wanted = chats()[kind]
    try:
        masked = mask_answers(tokenizer, messages, tools=tools, use_markers=False)
    except UnmarkableChat as error:
        words = str(error).removeprefix("The chat template does not ").removeprefix("take this chat: ")
        return "refused: " + _cell(words.rstrip("."))[:60]
    if masked.rewritten:
        return f"{len(wanted) - len(masked.rewritten)} of {len(wanted)} whole"
    return "yes"


def _beside_marks(text: str, marked: str) -> str:
    """How what is learnt of two turns differs from what `marked` marks."""
    tokenizer = tokenizer_for(text, marked)
    two, _, _ = chats()["two turns"]
    for messages in (two, in_parts(two)):
        try:
            tokenizer.chat_template = text
            ours = mask_answers(tokenizer, messages, use_markers=False)
            tokenizer.chat_template = marked
            theirs = mask_answers(tokenizer, messages)
        except UnmarkableChat:
            continue
        if ours.input_ids != theirs.input_ids:
            return "other text"
        pairs = list(zip(ours.input_ids, ours.mask, theirs.mask, strict=True))
        more = tokenizer.decode([token for token, our, their in pairs if their and not our])
        less = tokenizer.decode([token for token, our, their in pairs if our and not their])
        parts = [f"{words} {_shown([found])}" for words, found in (("marks", more), ("leaves out", less)) if found]
        return "; ".join(parts) or "equal"
    return "refused"


def _shown(runs: list[str]) -> str:
    return ", ".join(f"`{_cell(run)}`" for run in runs)


def _cell(text: str) -> str:
    return (
        re.sub(r"\s*\n", lambda found: "\u23ce" * found[0].count("\n"), text).replace("|", "\u00a6").replace("`", "'")
    )


def table(found: list[tuple[str, ...]]) -> str:
    """Markdown; a bar in a mark is written as a broken one."""
    lines = [HEADER, ("---",) * len(HEADER), *found]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def page_with(text: str, made: str) -> str:
    """`text` of the page with `made` as its table."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + made + "\n" + END + rest.split(END)[1]


def main() -> None:
    """Write the page, or print the table of the folders that are named."""
    folders = [Path(argument) for argument in sys.argv[1:]]
    if not folders:
        PAGE.write_text(page_with(PAGE.read_text("utf-8"), table(rows(template_files()))), "utf-8")
        return
    for folder in folders:
        files = {f"{folder.name}/{f.stem}": f for f in sorted(folder.glob("*.jinja"))}
        found = rows({name: f for name, f in files.items() if not f.stem.endswith("_training")})
        refused = sum(row[2].startswith("refused") for row in found)
        print(table(found) + f"\n{folder.name}: {len(found)} templates, {refused} refused.\n")


if __name__ == "__main__":
    main()
