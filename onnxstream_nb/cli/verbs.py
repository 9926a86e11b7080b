"""The verbs and their flags, as tables. The code that runs a verb is named, not imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .conversions import CONVERT, EXPORT, QUANTIZE, VOCAB
from .options import Option, choice, dimension, gigabytes, number, numbers, size, text, truth, whole

INFINITY = float("inf")

DEBUG = Option(("--debug",), "show the traceback of an error", truth, default=False)
TRACE = Option(("--trace",), "time and bytes of each operator, on stderr", truth, default=False)
JSON = Option(("--json",), "print one JSON object and nothing else", truth, default=False)
THREADS = Option(("--threads",), "threads; default: the physical cores", whole(1), "N")
PRECISION = Option(
    ("--precision",),
    "how a prompt is computed: exact as in float32, fast in bfloat16 (block encodings: in 8 bits)"
    " where the processor has it; default: fast for weights stored as floats, else exact",
    choice("auto", "fast", "exact"),
    "KIND",
    default="auto",
)
KV_CACHE = Option(
    ("--kv-cache",),
    "how keys and values of the context are kept: f16, or q8 in a little over half the memory",
    choice("f16", "q8"),
    "KIND",
    default="f16",
)
KV_SPILL = Option(
    ("--kv-spill",),
    "folder for keys and values that --ram has no room for, or off: then they must fit; default: in"
    " the cache",
    text,
    "DIR",
)
KEEP_PACKED = Option(
    ("--keep-packed",),
    "keep quantised weights on disk once more, packed as they are multiplied: a large model starts"
    " sooner then, and is streamed without packing it in every pass; deleted with rm MODEL",
    truth,
    default=False,
)
CUDA = Option(
    ("--cuda",),
    "keep weights on an NVIDIA GPU, and multiply them there: gigabytes of its memory or a size,"
    " auto or all for what is free; without a GPU, the CPU is used",
    gigabytes,
    "N",
)
LOADING = (
    Option(
        ("--load",),
        "how weights are held: stream reads them for each token, mmap maps the file, ram keeps"
        " them; default: what fits in free memory",
        choice("auto", "stream", "mmap", "ram"),
        "KIND",
        default="auto",
    ),
    Option(("--ram",), "most memory to use, for example 2GB; the rest is streamed", size, "SIZE"),
    CUDA,
    THREADS,
    PRECISION,
    KV_CACHE,
    KV_SPILL,
    KEEP_PACKED,
    Option(("--context",), "most tokens of context; default: the model's own", whole(1), "N"),
)
SPECULATION = (
    Option(
        ("--draft",),
        "a smaller model of the same vocabulary, whose guesses are checked several a pass",
        text, "MODEL",
    ),
    Option(
        ("--speculate",),
        "guess up to N tokens a pass, 0 to 7, from how the text went on before; default: 7 when"
        " weights are streamed, else 0",
        whole(0, 7), "N",
    ),
)  # fmt: skip
SAMPLING = (
    Option(
        ("--temperature",), "randomness, 0 takes the likeliest token; default 0.8",
        number(0, INFINITY), "T",
    ),
    Option(("--top-k",), "keep the K likeliest, 0 keeps all; default 40", whole(0), "K"),
    Option(
        ("--top-p",), "keep the likeliest that sum to P; default 0.95",
        number(0, 1, above=True), "P",
    ),
    Option(("--min-p",), "drop those below P of the likeliest; default 0.05", number(0, 1), "P"),
    Option(
        ("--repeat-penalty",), "divide logits of recent tokens by R; default 1.0",
        number(0, INFINITY, above=True), "R",
    ),
    Option(
        ("--presence-penalty",), "subtract P from logits of recent tokens; default 0.0",
        number(-INFINITY, INFINITY), "P",
    ),
    Option(
        ("--frequency-penalty",), "subtract P for each recent occurrence; default 0.0",
        number(-INFINITY, INFINITY), "P",
    ),
    Option(("--stop",), "stop before this text; may be repeated", text, "TEXT", repeat=True),
    Option(("--seed",), "same seed, same text; with --draft another one", whole(0), "S"),
)  # fmt: skip
SHOW_PROMPT = Option(
    ("--show-prompt",), "print the rendered prompt on stderr", truth, default=False
)
SYSTEM = Option(("--system",), "the system prompt", text, "TEXT")
MAX_TOKENS = Option(("--max-tokens",), "stop after N tokens", whole(1), "N")
CHAT = (
    Option(("--continue",), "go on with the last session", truth, default=False),
    SYSTEM, MAX_TOKENS, *SAMPLING, *LOADING, *SPECULATION, SHOW_PROMPT, TRACE,
)  # fmt: skip
GENERATE = (
    Option(("--prompt",), "the prompt; - reads it from stdin", text, "TEXT"),
    Option(
        ("--batch",),
        "a file of prompts instead, answered side by side: one a line, or JSON lines with prompt,"
        " system, max_tokens and id; - reads it from stdin; with --json a line for each reply",
        text,
        "FILE",
    ),
    Option(
        ("--batch-size",),
        "prompts of --batch in a pass; default: 8, or what there is memory for; with more than 8,"
        " replies may differ in the last bits from those of single runs",
        whole(1),
        "N",
    ),
    SYSTEM,
    Option(("--raw",), "use no chat template", truth, default=False),
    MAX_TOKENS, *SAMPLING, *LOADING, *SPECULATION, SHOW_PROMPT, JSON, TRACE,
)  # fmt: skip
BENCH = (
    Option(
        ("-p", "--n-prompt"), "prompt lengths to read, 0 for none; default 128,512",
        numbers(0), "N,N", default=(128, 512),
    ),
    Option(
        ("-n", "--n-gen"), "tokens to generate, 0 for none; default 64",
        numbers(0), "N", default=(64,),
    ),
    Option(
        ("-d", "--n-depth"), "tokens in the context before each test; default 0",
        numbers(0), "DEPTH", default=(0,),
    ),
    Option(("-r", "--repetitions"), "runs of each test; default 5", whole(1), "R", default=5),
    Option(
        ("--random-weights",), "a catalogue model's geometry filled with random weights",
        truth, default=False,
    ),
    Option(
        ("--dtype",), "storage of random weights: f16, q8_0 or q4_0; default f16",
        choice("f16", "q8_0", "q4_0"), "TYPE",
    ),
    *LOADING[:-1], JSON, TRACE,
)  # fmt: skip
PERPLEXITY = (
    Option(("--text",), "a file of UTF-8 text to predict", text, "FILE", required=True),
    Option(
        ("--window",),
        "tokens of a window; each starts from an empty cache, and only the second half of it"
        " counts; default 512",
        whole(8),
        "W",
        default=512,
    ),
    Option(("--tokens",), "read the first N tokens of the text only", whole(1), "N"),
    Option(
        ("--batch",), "read at most N tokens at a time, 1 as in generating; default: as a prompt",
        whole(1), "N",
    ),
    Option(
        ("--reference",), "a model of the same vocabulary to compare with: KL(reference || model)",
        text, "MODEL",
    ),
    Option(
        ("--reference-precision",),
        "the reference's precision; alone it compares the model with itself at that precision",
        choice("fast", "exact"),
        "KIND",
    ),
    *LOADING[:-1], JSON, TRACE,
)  # fmt: skip
INSPECT = (
    Option(
        ("--plan",), "print what will run, in order, and what is alive at its widest step",
        truth, default=False,
    ),
    Option(("--ops",), "only the table of operators", truth, default=False),
    Option(
        ("--tokens",), "a pass's tokens (or other open sizes), for its activations; default 512",
        whole(1), "N", default=512,
    ),
    LOADING[-1], JSON,
)  # fmt: skip
VERIFY = (
    Option(
        ("--size",),
        "an open size of the inputs of a graph that is no language model, as NAME=N, or N for all"
        " others; may be repeated; default 1",
        dimension,
        "SIZE",
        repeat=True,
    ),
    *LOADING[:2], THREADS, JSON,
)  # fmt: skip
YES = Option(("-y", "--yes"), "do not ask", truth, default=False)


@dataclass(frozen=True, slots=True)
class Verb:
    """One command: where its function is (`module:function` in onnxstream_nb), its flags, whether
    it takes MODEL (`required`, `optional` or not at all), and what that may be."""

    run: str
    help: str
    options: tuple[Option, ...] = ()
    model: str = ""
    about: str = "a catalogue name, a path, or a hub repository owner/name[:file or quantisation]"


VERBS: Mapping[str, Verb] = {
    "chat": Verb("cli.commands:chat", "talk with a model", CHAT, "optional"),
    "generate": Verb(
        "cli.batch:generate", "complete one prompt, or a file of them", GENERATE, "required"
    ),
    "bench": Verb("measure:bench", "measure tokens per second", BENCH, "required"),
    "perplexity": Verb(
        "cli.perplexity:perplexity",
        "measure how well a model predicts a text",
        PERPLEXITY,
        "required",
    ),
    "export": Verb(
        "cli.export:export",
        "a PyTorch model to ONNX, compared with PyTorch",
        (*EXPORT, JSON),
        "optional",
        "a Hugging Face folder, or a hub repository owner/name, if there is no --module",
    ),
    "inspect": Verb("cli.report:inspect", "operators, weights, memory, plan", INSPECT, "required"),
    "verify": Verb(
        "cli.verify:verify",
        "check a model's files, weights and tokenizer, and a forward pass",
        VERIFY,
        "required",
    ),
    "convert": Verb(
        "cli.convert:convert",
        "write a model in another format or type",
        (*CONVERT, JSON),
        "required",
    ),
    "quantize": Verb(
        "cli.quantize:quantize",
        "round a model's weights to 8 or 4 bits",
        (*QUANTIZE, JSON),
        "required",
    ),
    "vocab": Verb(
        "cli.vocab:vocab",
        "turn a vocabulary into OnnxStream's vocab.txt, or a tokenizer.model",
        VOCAB,
        "required",
        "a tokenizer.model, tokenizer.json, vocab.txt or GGUF, or a folder with one",
    ),
    "pull": Verb("cli.commands:pull", "download a model", (), "required"),
    "list": Verb("cli.commands:list_models", "models here and in the catalogue", (JSON,)),
    "show": Verb("cli.report:show", "what is known about a model", (JSON,), "required"),
    "rm": Verb("cli.commands:remove", "delete a downloaded model", (YES,), "required"),
    "doctor": Verb("cli.doctor:doctor", "check this machine and this installation", (JSON,)),
}
