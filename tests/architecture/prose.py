"""Rules for the prose of the tree: openings of docstrings, verbs, relative "what", American spelling, retired names.

`python -m tests.architecture.prose` prints every finding, grouped by part; with names of parts or paths (`launch`, `docs`,
`src/accelerate/launch/plan.py`) only theirs.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tests.architecture.rules import ROOT

OPENINGS = re.compile(
    r"\s*(?:(?P<word>What|Those|One (?:that|which|who)|Of)\b|Whether\b[^.\n]*\b(?:has|have|had) had\b)",
)
"""A docstring starts with a verb, or with a noun that carries its type."""

VERBS = re.compile(
    r"\b(?:say|says|said|saying|tell|tells|told|telling|know|knows|known|knew|knowing|nobody|hear|hears|heard"
    r"|let\s+go|lets\s+go|letting\s+go|in\s+vain)\b",
    re.IGNORECASE,
)
"""Code raises, returns, sends, stores, releases and blocks."""

IDIOMS = {
    r"well[- ]known": "fixed expression: well-known ports, well-known names",
    r"(?:best|widely|also|otherwise|commonly) known": "fixed expressions about people, not about the state of code",
    r"known (?:issue|bug|limitation)s?": "fixed expressions of issue trackers",
    r"(?:is|are) (?:not )?known (?:in advance|ahead of time|at compile time)": "fixed expressions of compilers",
    r"(?:lets?|letting) (?:you|users?|callers?) know": "the one who knows is a person",
    r"(?:you|users?|people|readers?) (?:do not |don't |already |may |must |need to )?know": "the one who knows is a person",
    r"(?:you|users?|people|readers?) (?:told|said|say|tell)": "the speaker is a person",
}
"""Expressions of the words above that are plain English, with the reason; spaces stand for any white space."""

WHAT = re.compile(r"\bwhat\b", re.IGNORECASE)
WHAT_LIMIT = 1.5
"""Occurrences of "what" per 1,000 words of docstrings and comments; one is always free, for small modules."""

_ISE = (
    "amortis|anonymis|apologis|authoris|canonicalis|capitalis|categoris|centralis|characteris|criticis|customis|"
    "decentralis|discretis|emphasis|equalis|factoris|finalis|formalis|generalis|harmonis|initialis|internalis|itemis|"
    "linearis|localis|materialis|maximis|memoris|minimis|modernis|monopolis|neutralis|normalis|optimis|organis|"
    "parallelis|parametris|penalis|personalis|polaris|popularis|prioritis|quantis|randomis|realis|recognis|regularis|"
    "scrutinis|serialis|specialis|stabilis|standardis|summaris|symbolis|synchronis|tokenis|utilis|vectoris|virtualis|visualis"
)
SPELLING = re.compile(
    rf"(?:{_ISE})(?:e|es|ed|er|ers|ing|ation|ations|able|ability)(?![a-z])"
    r"|behaviour|colour|neighbour|favour|honour|flavour|labour|rumour|endeavour"
    r"|centre(?:s|d)?(?![a-z])|centring(?![a-z])|licence|defence|offence|catalogue|artefact|programme(?![drs])|whilst"
    r"|analyse(?!s)|analysing|paralyse|(?:travel|model|label|signal|level|fuel|total|channel|tunnel|marshal)l(?:ed|ing|er)"
    r"|fulfil(?!l)|(?<![a-z])(?:grey|spelt|learnt|burnt|ageing|storey|tyre|judgement|acknowledgement)(?![a-z])",
    re.IGNORECASE,
)
"""British spellings, in identifiers and names of files too."""

SPELLED_BY_OTHERS: dict[str, str] = {}
"""Names that others spell the British way, as `module.name`, with the reason."""

OLD_WORDS: dict[str, str] = {
    # strategies
    "agree_on_random_states": "sync_rng",
    "FlatShards": "FSDP1Strategy",
    "FullyShard": "FSDP2Strategy",
    "GlobalMean": "TokenWeightedMean",
    "MicroStep": "AccumulateContext",
    "overflow_of": "found_inf_of",
    "RunSettings": "StrategyConfig",
    "saves_open_windows": "can_save_mid_accumulation",
    "ShardedStrategy": "FSDPStrategy",
    "units_of": "select_wrap_modules",
    "without_torn_ties": "without_shared_params",
    # strategies/parallel
    "average_gradients": "register_grad_all_reduce",
    "give_new_parameters": "remap_optimizer",
    "GradientAverage": "BucketedGradReducer",
    "HeadsTravel": "UlyssesBackend",
    "holder_of": "find_captured_function",
    "instead_of": "normalize_mask",
    "is_averaged": "has_grad_all_reduce",
    "is_composed": "is_tensor_subclass",
    "KeysTravel": "RingBackend",
    "leave_packing": "disable_cpu_repacking",
    "not_divided": "divisibility_error",
    "put_together": "unshard_outputs",
    "receive_buffers": "broadcast_buffers",
    "same_everywhere": "broadcast_model",
    "SharedSequences": "ContextParallelManager",
    "way_of": "select_backend",
    # checkpointing
    "optimizer_entries": "load_optimizer_items",
    "model_entries": "load_model_items",
    "model_entry": "save_model",
    "optimizer_entry": "save_optimizer",
    "loader_entries": "SaveLoader, LoadLoader",
    "put_gradients": "restore_gradients",
    "shards_of_model": "save_sharded_model",
    "_stop_request": "_preemption",
    "of_the_first": "broadcast_from_rank0",
    "newest_valid": "latest_valid",
    "StopRequest": "PreemptionHandler",
    "write_whole": "atomic_write",
    "without_aliases": "drop_shared_tensors",
    "finish_pieces": "write_shard_index",
    "piece_names": "shard_file_names",
    "shared_names": "shared_tensor_names",
    "BackgroundWriter": "AsyncSaver",
    "settle_all": "recover_all",
    "read_entries": "read_items",
    "CheckpointMethods": "CheckpointMixin",
    "_lonely_branches": "_rank_branches",
    "saves_whole": "saves_full_state",
    # checkpointing/storage,sharded
    "Held": "LocalShard",
    "Saved": "LazyTensor",
    "SavedWeights": "LazyStateDict",
    "SavedOptimizer": "LazyOptimizerState",
    "StoredFolder": "DCPReader",
    "DamagedError": "CorruptFileError",
    "CheckedFile": "ChecksummedReader",
    "Outgoing": "Upload",
    "in_parallel": "thread_map",
    "record_of": "fingerprint",
    "room_made_later": "deferred_unlink",
    "wait_for_room": "wait_for_unlinks",
    "sum_of_stretch": "block_checksum",
    "plain_name": "clean_fqn",
    "names_of": "index_params",
    "own_shards": "plan_writes",
    "write_shards": "write_items",
    "weights_in_file": "wrap_weights",
    "weights_in_folder": "read_dcp_weights",
    "optimizer_in_file": "wrap_optimizer_state",
    "optimizer_in_folder": "read_dcp_optimizer",
    "other_kind": "class_mismatch",
    "ties_in": "tied_names",
    "mistyped": "type_mismatches",
    "kinds_of": "value_types",
    "no_optimizer": "optimizer_state_error",
    "folders_of_shards": "shard_folders",
    "is_ours": "is_checkpoint_file",
    # data_loader
    "can_agree": "supports_lockstep",
    "CannotCutError": "BatchSlicingError",
    "chain_from": "sampler_chain",
    "Cutter": "BatchSlicer",
    "deal_batches": "shard_batches",
    "deal_items": "shard_items",
    "drawn_from": "index_sampler",
    "epoch_takers": "samplers_with_epoch",
    "IndexStream": "LookaheadSampler",
    "kept_arguments": "forwarded_arguments",
    "mover": "make_transfer_fn",
    "Outlasting": "IgnoreSigterm",
    "ResumableIndices": "ResumableIterator",
    "rounds_of": "iter_with_step_sizes",
    "samples_drawn": "samples_per_epoch",
    "SeededSamples": "SeededDataset",
    "StepReader": "LockstepReader",
    "Unmark": "StripMarkers",
    "words_of": "select_host_collectives",
    # offload,quantization,inference
    "Brought": "PendingTransfer",
    "CutShort": "TruncatedFileError",
    "StreamLane": "DeviceTransferStream",
    "are_at_hand": "are_resident",
    "ask_for_large_pages": "advise_huge_pages",
    "at_hand": "is_resident",
    "lane_to": "stream_to",
    "layers_to_quantise": "layers_to_quantize",
    "quantise_in_place": "quantize_in_place",
    "as_quantised": "quantized_state",
    "_give_up_others": "_release_other_stages",
    # launch
    "environment_over": "merged_environment",
    "check_named": "require_script",
    "yields": "overridable",
    "_agent_arguments": "_torchrun_arguments",
    "run_beside": "run_subprocess",
    "remarks": "host_warnings",
    "Words": "ParsedArgs",
    "of_words": "resolve_args",
    "of_namespace": "from_namespace",
    "assemble": "merge_settings",
    "Chosen": "SourcedValue",
    "understand": "parse_content",
    "OLD_SECTIONS": "LEGACY_SECTIONS",
    "OLD_KINDS": "LEGACY_DISTRIBUTED_TYPES",
    "_weigh": "_count_values",
    "_culprit": "_find_invalid_scalar",
    "Verdict": "ExitReport",
    "Guard": "OrphanReaper",
    "Deaths": "ExitWatcher",
    "die_with": "set_parent_death_signal",
    "Loopback": "LoopbackRendezvous",
    "_Ranks": "WorkerGroup",
    "_Ours": "AccelerateElasticAgent",
    "lost_a_peer": "lost_peer",
    "Neighbours": "PeerMonitor",
    "Elsewhere": "PeerExitError",
    "Meeting": "StaticRendezvous",
    "NoMeeting": "RendezvousError",
    "call_again": "request_restart",
    "guilt": "blame_key",
    "call_off": "cancel",
    "_linger": "_acknowledge_outcome",
    "are_elsewhere": "any_remote",
    "launcher_of": "multinode_launcher",
    "for_other_machines": "environment_file",
    "to_hyperparameters": "parse_hyperparameters",
    "plan_job": "build_job",
    "as_typed": "format_plan",
    "_hurry": "_wake_up",
    "_take_leave": "_leave_peers",
    "_hand_on": "_forward_signal",
    "innocent": "is_symptom",
    "state_of": "process_state",
    "_patient": "_stop_timeout",
    # settings
    "_on_the_wire": "_with_wire_dtype",
    "spelt": "format_value",
    # commands
    "CannotFollow": "TraceError",
    "_laid_out": "_format_node",
    "_settle_with_aws": "_configure_aws",
    "follow_step": "trace_step",
    "follow_units": "trace_units",
    # runtime
    "DataRanks": "DataShard",
    "NoWay": "NoRouteError",
    "NameUnknown": "HostNotFoundError",
    "give_back_freed": "malloc_trim",
    "bare_model": "unwrap_module",
    "open_past": "open_direct",
    "of_scheduler": "from_scheduler",
    "guessed_from": "address_source",
    "is_own": "is_local_address",
    "lone_device": "single_process_device",
    "when_leaving": "on_leave",
    "holds_only_tensors": "contains_only_tensors",
    "nodes_of_batch_job": "batch_job_node_count",
    "peer_access_works": "p2p_supported",
    "modules_among": "resolve_modules",
    "path_to_change": "path_for_write",
    "require_regular": "require_regular_file",
    "LARGEST_TEXT": "MAX_METADATA_BYTES",
    "regular_size": "regular_file_size",
    "is_local_rank_given": "has_local_rank",
    "knock": "try_connect",
    "summary_of": "summarize",
    "dimensions_only": "ndim_only",
    # others
}
"""Retired identifiers and the names that replaced them. A row comes with each rename, and holds everywhere in src."""

PARTS_BESIDE = ("docs", "tests", "examples", "benchmarks", "tools", ".ci")
TEXTS = {".py", ".pyi", ".md", ".txt", ".toml", ".ini", ".cfg", ".yml", ".yaml", ".json", ".sh", ".c", ""}
THIS = {"tests/architecture/prose.py", "tests/architecture/test_prose.py"}


@dataclass(frozen=True)
class Finding:
    """A phrase that breaks a rule, at a line of a file below the root of the repository."""

    path: str
    line: int
    rule: str
    phrase: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}: {self.phrase}"


@dataclass(frozen=True)
class Prose:
    """A docstring, a block of comments or a message, with the line on which it starts."""

    kind: str
    line: int
    text: str

    def line_of(self, offset: int) -> int:
        return self.line + (self.text.count("\n", 0, offset) if self.kind != "message" else 0)


def prose_of(source: str) -> list[Prose]:
    """Extracts docstrings (of attributes too), comments, and string literals of three words or more.

    Comments on consecutive lines are one.
    """
    tree = ast.parse(source)
    docstrings: list[ast.Constant] = []
    inside: set[int] = set()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings.append(node.value)
            inside.add(id(node.value))
        elif isinstance(node, ast.JoinedStr):
            parts = [part for part in node.values if isinstance(part, ast.Constant)]
            inside.update(map(id, parts))
            text = "{}".join(str(part.value) for part in parts)
            found.append(Prose("message", node.lineno, text))
    found += [Prose("docstring", node.lineno, str(node.value)) for node in docstrings]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            found.append(Prose("message", node.lineno, node.value))
    found = [each for each in found if each.kind == "docstring" or len(re.findall(r"[A-Za-z]+ ", each.text)) >= 2]
    return sorted([*found, *_comments(source)], key=lambda each: each.line)


def _comments(source: str) -> Iterator[Prose]:
    start, lines = 0, list[str]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if lines and token.start[0] != start + len(lines):
            yield Prose("comment", start, "\n".join(lines))
            lines = []
        start = start if lines else token.start[0]
        lines.append(token.string.lstrip("# "))
    if lines:
        yield Prose("comment", start, "\n".join(lines))


def without_code(text: str) -> str:
    """Blanks code blocks, doctests, quoted code and addresses; positions and lines stay as they are."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match.group())

    for pattern in (r"```.*?(?:```|\Z)", r"^\s*(?:>>>|\.\.\.) .*$", r"``[^`]+``", r"`[^`\n]+`", r"https?://\S+"):
        text = re.sub(pattern, blank, text, flags=re.DOTALL | re.MULTILINE if "`" * 3 in pattern else re.MULTILINE)
    return text


def words(text: str) -> int:
    """Counts the words of a docstring or comment, code blocks aside."""
    return len(re.findall(r"[A-Za-z][A-Za-z'’-]*", without_code(text)))


def opening(text: str) -> str:
    """Returns the opening of a docstring that breaks the rule, or ""."""
    match = OPENINGS.match(text)
    return " ".join(match.group().split()) if match else ""


def wrong_verbs(text: str) -> Iterator[tuple[int, str]]:
    """Yields position and phrase of each verb that code does not do, idioms aside."""
    text = without_code(text)
    allowed = [
        match.span()
        for idiom in IDIOMS
        for match in re.finditer(rf"\b{idiom}\b".replace(" ", r"\s+"), text, re.IGNORECASE)
    ]
    for match in VERBS.finditer(text):
        if not any(start <= match.start() and match.end() <= end for start, end in allowed):
            yield match.start(), around(text, match)


def around(text: str, match: re.Match[str]) -> str:
    """Quotes a match with a few words on either side."""
    before = text[max(0, match.start() - 30) : match.start()].split(" ")
    after = text[match.end() : match.end() + 30].split(" ")
    quoted = " ".join(" ".join([*before[-4:-1], before[-1] + match.group() + after[0], *after[1:4]]).split())
    return f"“{quoted}”"


def british(text: str) -> Iterator[tuple[int, str]]:
    """Yields position and word of each British spelling."""
    for match in SPELLING.finditer(text):
        start, end = match.span()
        while start and (text[start - 1].isalnum() or text[start - 1] == "_"):
            start -= 1
        while end < len(text) and (text[end].isalnum() or text[end] == "_"):
            end += 1
        if text[start:end] not in SPELLED_BY_OTHERS:
            yield match.start(), text[start:end]


def identifiers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields line and name of every identifier: names, attributes, definitions, parameters, keywords and imports."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 1)
        if isinstance(node, ast.Name):
            yield line, node.id
        elif isinstance(node, ast.Attribute):
            yield line, node.attr
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield line, node.name
        elif isinstance(node, (ast.arg, ast.keyword)) and node.arg:
            yield line, node.arg
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            dotted = [getattr(node, "module", None) or "", *(item.name for item in node.names)]
            for name in dotted:
                yield from ((line, part) for part in name.split(".") if part)


def old_words(tree: ast.Module, table: dict[str, str]) -> Iterator[tuple[int, str]]:
    """Yields line and advice for each retired identifier."""
    for line, name in identifiers(tree):
        if name in table:
            yield line, f"{name}, now {table[name]}"


def retired(texts: dict[str, str], table: dict[str, str]) -> list[Finding]:
    """Lists every use of a retired identifier, and modules that still have its name, in the sources among some files."""
    found = []
    for path, text in texts.items():
        if is_source(path):
            stem = path.rpartition("/")[2].removesuffix(".py")
            named_so = [(1, f"module {stem}, now {table[stem]}")] if stem in table else []
            uses = [*named_so, *old_words(ast.parse(text), table)]
            found += [Finding(path, line, "retired name", advice) for line, advice in uses]
    return found


def part_of(path: str) -> str:
    """Returns the part of the tree to which a file belongs, which is what a list of pending parts names.

    Below src/accelerate this is the top folder or the top module; beside it the folder, of tests the one below too.
    """
    if path.startswith("src/accelerate/"):
        return path.split("/")[2].split(".")[0]
    pieces = path.split("/")
    return "/".join(pieces[:2]) if pieces[0] == "tests" and len(pieces) > 2 else pieces[0]


def is_source(path: str) -> bool:
    """Returns whether a path is that of a module of the package."""
    return path.startswith("src/accelerate/") and path.endswith(".py")


def files() -> dict[str, str]:
    """Reads every text of the tree, under its path below the root of the repository."""
    inside = [path for folder in ("src/accelerate", *PARTS_BESIDE) for path in sorted((ROOT / folder).rglob("*"))]
    inside += sorted(ROOT.glob("*.md"))
    found = {}
    for path in inside:
        name = path.relative_to(ROOT).as_posix()
        if path.is_file() and path.suffix in TEXTS and "__pycache__" not in path.parts and name not in THIS:
            found[name] = path.read_text(encoding="utf-8", errors="replace")
    return found


def findings_in(path: str, text: str, pieces: Iterable[Prose] = ()) -> list[Finding]:
    """Applies the rules to one file: all of them to sources, verbs and spelling to Markdown, spelling to the rest."""
    found = []
    for offset, word in british(text):
        found.append(Finding(path, text.count("\n", 0, offset) + 1, "British spelling", word))
    found += [Finding(path, 1, "British spelling in the file's name", word) for _, word in british(path.split("/")[-1])]
    if path.endswith(".md"):
        for offset, phrase in wrong_verbs(text):
            found.append(Finding(path, text.count("\n", 0, offset) + 1, "verb", phrase))
    if is_source(path):
        for piece in pieces:
            if piece.kind == "docstring" and opening(piece.text):
                found.append(Finding(path, piece.line, "opening", f"“{piece.text.split(chr(10))[0][:60]}”"))
            for offset, phrase in wrong_verbs(piece.text):
                found.append(Finding(path, piece.line_of(offset), "verb", phrase))
    return sorted(found, key=lambda finding: finding.line)


def whats_in(path: str, pieces: Iterable[Prose]) -> tuple[int, list[Finding]]:
    """Counts the words of a source's docstrings and comments, and lists each "what" among them."""
    count, found = 0, list[Finding]()
    for piece in pieces:
        if piece.kind != "message":
            count += words(piece.text)
            plain = without_code(piece.text)
            for match in WHAT.finditer(plain):
                found.append(Finding(path, piece.line_of(match.start()), "what", around(plain, match)))
    return count, found


@dataclass
class Report:
    """The findings of one part of the tree, with its words, and what its `what`s come to."""

    part: str
    broken: list[Finding]
    whats: list[Finding]
    words: int

    @property
    def too_many_whats(self) -> bool:
        return len(self.whats) > max(1, WHAT_LIMIT * self.words / 1000)

    def violations(self) -> list[Finding]:
        """Lists what must go: every finding, and each "what" if there are more than the limit allows."""
        return [*self.broken, *(self.whats if self.too_many_whats else [])]


def reports(texts: dict[str, str]) -> dict[str, Report]:
    """Reports on every part of a tree of files."""
    made: dict[str, Report] = {}
    for path, text in texts.items():
        report = made.setdefault(part_of(path), Report(part_of(path), [], [], 0))
        pieces = prose_of(text) if is_source(path) else []
        count, whats = whats_in(path, pieces)
        report.broken += findings_in(path, text, pieces)
        report.words += count
        report.whats += whats
    return made


def named(path: str, name: str) -> bool:
    """Returns whether a part, a folder or a file, below the root or below src/accelerate, includes a file."""
    folders = (name, f"src/accelerate/{name}")
    return part_of(path) == name or path in folders or path.startswith(tuple(f"{folder}/" for folder in folders))


def main(arguments: Iterable[str]) -> int:
    """Prints the findings in the parts, files or folders named, or in all, and returns 1 if there is one."""
    wanted = [argument.rstrip("/") for argument in arguments]
    texts = {path: text for path, text in files().items() if not wanted or any(named(path, name) for name in wanted)}
    total = 0
    for report in reports(texts).values():
        lines = report.violations()
        rate = f", “what” {len(report.whats)} times in {report.words} words" if report.words else ""
        print(*lines, f"== {report.part}: {len(lines)} findings{rate}", sep="\n")
        total += len(lines)
    for finding in retired(texts, OLD_WORDS):
        print(finding)
        total += 1
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
