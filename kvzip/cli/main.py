"""The `kvzip` command and its commands."""

import click

from ..version import VERSION
from .append import append
from .ask import ask
from .bench import bench
from .chat import chat
from .compare import compare
from .compress import compress
from .demo import demo
from .evaluate import evaluate
from .heads import heads
from .info import info
from .listing import ls
from .plumbing import Group
from .report import report
from .tune import tune


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""
    kvzip demo
    kvzip compress contract.pdf -m qwen2.5-7b -r 0.3 -o contract.kvz
    kvzip ask contract.kvz "Who signed it?" "When?"
    kvzip chat contract.kvz
    eval "$(_KVZIP_COMPLETE=bash_source kvzip)"    # completion in bash; in zsh zsh_source
    """,
)
@click.version_option(VERSION)
def main() -> None:
    """Compress documents once, answer any question later from a fraction of the key-value cache."""


for each in (demo, compress, tune, ask, chat, append, ls, info, report, compare, heads, evaluate, bench):
    main.add_command(each)
