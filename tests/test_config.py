"""Options: the precedence of defaults, files and the command line, and the errors for bad values."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgecloud_sd import config
from edgecloud_sd.config import OPTIONS, ConfigError, resolve
from edgecloud_sd.forecast.calibration import save_calibration
from edgecloud_sd.grid import strategies
from tests.support.calibrations import CALIBRATION

BY_NAME = {option.name: option for option in OPTIONS}
COUNTS = ("k", "rank", "max-samples", "max-new-tokens")
REQUIRED = [option.name for option in OPTIONS if not option.optional]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mine.yaml"


def test_without_a_file_and_options_the_defaults_apply() -> None:
    resolved = resolve({})
    assert resolved.mode == ("edge", "cloud", "speculative", "lossless", "revise", "revise-lossless")
    assert (resolved.k, resolved.rank, resolved.entropy_threshold) == ((3,), (20,), (1.5,))
    assert (resolved.edge_model, resolved.max_samples) == (None, None)


def test_a_file_overrides_the_defaults_and_the_command_line_overrides_both(file: Path) -> None:
    file.write_text("k: 5\nrank: 7\n")
    resolved = resolve({"rank": "9"}, file)
    assert (resolved.k, resolved.rank, resolved.max_new_tokens) == ((5,), (9,), 64)


def test_an_option_that_is_not_given_does_not_override_the_file(file: Path) -> None:
    file.write_text("k: 5")
    assert resolve(dict.fromkeys(BY_NAME), file).k == (5,)


def test_an_empty_file_changes_nothing(file: Path) -> None:
    file.write_text("# nothing yet\n")
    assert resolve({}, file) == resolve({})


def test_a_file_may_write_values_as_the_command_line_does(file: Path) -> None:
    file.write_text("k: '3,5'\nlanguage: chinese, english\nmax-samples: '2'")
    assert resolve({}, file) == resolve({"k": "3,5", "language": "chinese,english", "max-samples": "2"})


@pytest.mark.parametrize("name", ["entropy-threshold", "entropy_threshold"])
def test_names_in_a_file_may_have_hyphens_or_underscores(file: Path, name: str) -> None:
    file.write_text(f"{name}: [0.5, .inf]")
    assert resolve({}, file).entropy_threshold == (0.5, math.inf)


def test_a_byte_that_is_not_utf_8_is_refused_before_a_run() -> None:
    with pytest.raises(ConfigError, match=r"^--dataset-path: has U\+DCFF, half of a character, at 3; "):
        resolve({"dataset-path": "abc\udcff"})


def test_the_dataset_type_of_the_published_guide_is_accepted() -> None:
    assert resolve({"dataset-type": "unified"}) == resolve({})
    with pytest.raises(ConfigError, match="--dataset-type: 'secap' is not one of unified"):
        resolve({"dataset-type": "secap"})


def test_lists_become_tuples_without_repeats_in_the_order_given(file: Path) -> None:
    file.write_text("k: [5, 3, 5]\nlanguage: [english, chinese, english]")
    resolved = resolve({"entropy-threshold": "2, 1.0,1,2.0"}, file)
    assert resolved.k == (5, 3)
    assert resolved.language == ("english", "chinese")
    assert resolved.entropy_threshold == (2.0, 1.0)


def test_an_empty_value_unsets_an_optional_setting(file: Path) -> None:
    file.write_text("max-samples: 5\nedge-model: a/b")
    resolved = resolve({"max-samples": "", "edge-model": ""}, file)
    assert (resolved.max_samples, resolved.edge_model) == (None, None)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        resolve({}).k = (1,)  # type: ignore[misc]


@pytest.mark.parametrize("name", BY_NAME)
def test_every_option_has_a_group_a_help_and_a_default_that_parses(name: str) -> None:
    option = BY_NAME[name]
    assert option.group in config.GROUPS
    assert option.help.strip()
    text = "" if option.default is None else option.default_text
    assert option.parse(text) == option.default


def test_the_default_file_is_a_copy_of_the_defaults() -> None:
    file = Path(__file__).parents[1] / "bench" / "configs" / "default.yaml"
    defaults = config.read_file(file)
    assert {name: BY_NAME[name].parse(value) for name, value in defaults.items()} == {
        option.name: option.default for option in config.OPTIONS
    }


@pytest.mark.parametrize(
    ("name", "text", "expectation"),
    [
        ("mode", "fast", "edge, cloud, speculative"),
        ("mode", "edge,fast", "edge, cloud, speculative"),
        ("gate", "Entropy", "entropy, margin, logprob, token, token(margin), token(logprob), risk, always, never"),
        ("entropy-threshold", "high", "a number of nats"),
        ("entropy-threshold", "nan", "a number of nats"),
        ("entropy-threshold", "1_0", "a number of nats"),
        ("entropy-threshold", "\uff11.5", "a number of nats"),
        ("max-memory-gb", "1_6", "a number of GB"),
        ("k", "\uff13", "auto or a whole number of at least 1"),
        ("k", "0", "auto or a whole number of at least 1"),
        ("k", "-1", "auto or a whole number of at least 1"),
        ("k", "2.5", "auto or a whole number of at least 1"),
        ("k", "3,many", "auto or a whole number of at least 1"),
        ("draft-ahead", "0,-1", "a whole number of at least 0"),
        ("draft-ahead", "yes", "a whole number of at least 0"),
        ("draft-stop", "none,entropy=0", "nats above 0 for entropy"),
        ("draft-stop", "margin=2", "up to 1 for margin"),
        ("draft-stop", "margin", "none, entropy, entropy=x, margin=x"),
        ("rank", "0", "a whole number of at least 1"),
        ("max-samples", "all", "a whole number of at least 1"),
        ("max-new-tokens", "1e3", "a whole number of at least 1"),
        ("rule", "best", "greedy, rank, rank(r), synthetic(p)"),
        ("rule", "rank(0)", "with r of at least 1"),
        ("rule", "rank(-1)", "rank(r), synthetic(p), with r of at least 1"),
        ("rule", "greedy,synthetic(1.2)", "p of 0 to 1"),
        ("pair", "whisper", "pocket, qwen2.5-omni"),
        ("edge-dtype", "int2", "float32, float16, bfloat16, float64, int8, int4"),
        ("cloud-dtype", "float", "float32, float16, bfloat16, float64"),
        ("on-bad-clip", "ignore", "error, skip"),
        ("caption-type", "audio", "original, audio_only"),
        ("language", "zh", "chinese, english"),
        ("prompt-type", "long", "default, detailed, concise"),
        ("output-name", "../results", "a plain file name"),
        ("output-name", ".hidden", "a plain file name"),
    ],
)
def test_a_bad_value_is_refused_with_its_option_and_the_possible_values(
    file: Path, name: str, text: str, expectation: str
) -> None:
    with pytest.raises(ConfigError) as from_command_line:
        resolve({name: text})
    bad = text.split(",")[-1]
    assert str(from_command_line.value).startswith(f"--{name}: {bad!r} is not ")
    assert expectation in str(from_command_line.value)
    file.write_text(yaml.safe_dump({name: text.split(",") if BY_NAME[name].many else text}))
    with pytest.raises(ConfigError) as from_file:
        resolve({}, file)
    assert str(from_file.value) == f"{file}: {from_command_line.value}"


def test_a_bad_value_in_a_file_is_refused_even_if_the_command_line_overrides_it(file: Path) -> None:
    file.write_text("k: none")
    with pytest.raises(ConfigError, match=r"mine\.yaml: --k: 'none'"):
        resolve({"k": "3"}, file)


@pytest.mark.parametrize("name", REQUIRED)
def test_a_required_option_needs_a_value(name: str) -> None:
    for text in ("", " "):
        with pytest.raises(ConfigError) as error:
            BY_NAME[name].parse(text)
        assert str(error.value) == f"--{name}: needs a value"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("mode:", "--mode: needs a value"),
        ("k: []", "--k: needs at least one value"),
        ("pair: [pocket, pocket]", "--pair: takes one value, not ['pocket', 'pocket']"),
        ("language: [chinese, [english]]", "--language: takes one value, not ['english']"),
        ("max-samples: {a: 1}", "--max-samples: takes one value, not {'a': '1'}"),
        ("k: true", "--k: 'true' is not auto or a whole number"),
        ("max-samples: 1\nmax_samples: 2", "names an option twice"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(file: Path, content: str, complaint: str) -> None:
    file.write_text(content)
    with pytest.raises(ConfigError) as error:
        resolve({}, file)
    assert str(error.value).startswith(f"{file}: {complaint}")


@pytest.mark.parametrize("name", ["thresholds", "K", "mode ", "1"])
def test_an_unknown_option_is_refused_with_the_known_ones(file: Path, name: str) -> None:
    file.write_text(yaml.safe_dump({"k": 3, name: 3}))
    with pytest.raises(ConfigError) as error:
        resolve({}, file)
    assert str(error.value).startswith(f"{file}: unknown option {name}; known are ")
    assert all(option in str(error.value) for option in BY_NAME)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"k: [", "is not YAML"),
        (b"k: 3\n\x00", "is not YAML"),
        (b"k: \xff", "is not YAML"),
        (b"k: !!python/object:os.system 3", "is not YAML"),
        (b"k: !!int 010", "is not YAML"),
        (b"k: &a [*a]", "is not YAML"),
        (b"k: 3\npair: pocket\nk: 4", "is not YAML (line 3 names the key 'k' twice"),
        (b"- k", "must map options to values, not be a list"),
        (b"k", "must map options to values, not be a str"),
        (b"3", "must map options to values, not be a str"),
    ],
)
def test_a_file_that_is_not_a_mapping_in_yaml_is_refused(file: Path, content: bytes, complaint: str) -> None:
    file.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        resolve({}, file)
    assert str(error.value).startswith(f"{file}: {complaint}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nothing.yaml", "."])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve({}, tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}: cannot be read (")


@settings(max_examples=30)
@given(name=st.sampled_from(COUNTS), number=st.integers(1, 10**30), padding=st.sampled_from(["", " ", "\t"]))
def test_any_positive_whole_number_is_a_count(name: str, number: int, padding: str) -> None:
    value = BY_NAME[name].parse(f"{padding}{number}{padding}")
    assert value == ((number,) if BY_NAME[name].many else number)


@settings(max_examples=30)
@given(name=st.sampled_from(COUNTS), number=st.integers(max_value=0) | st.floats() | st.text(min_size=1))
def test_anything_else_is_refused_as_a_count(name: str, number: float | str) -> None:
    text = str(number)
    assume(text.strip())
    assume(not all(part.strip().isdecimal() and int(part) > 0 for part in text.split(",")))
    with pytest.raises(ConfigError) as error:
        BY_NAME[name].parse(text)
    assert f"--{name}: " in str(error.value)


@settings(max_examples=30)
@given(st.lists(st.floats(allow_nan=False), min_size=1))
def test_thresholds_are_parsed_without_repeats(thresholds: list[float]) -> None:
    assert BY_NAME["entropy-threshold"].parse(",".join(map(str, thresholds))) == tuple(dict.fromkeys(thresholds))


almost_valid = st.text(alphabet="acdegklnoprstuvwy(0123) ,-")


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("mode", "|".join(BY_NAME["mode"].choices)),
        ("gate", "|".join(map(re.escape, BY_NAME["gate"].choices))),
        ("rule", r"greedy|rank|rank\(0*[1-9]\d*\)|synthetic\((0|0?\.\d+|1)(/(0|0?\.\d+|1))*\)"),
    ],
)
@settings(max_examples=40)
@given(text=st.text() | almost_valid)
def test_random_text_raises_only_config_error(name: str, valid: str, text: str) -> None:
    assume(not all(re.fullmatch(valid, part.strip()) for part in text.split(",")))
    with pytest.raises(ConfigError) as error:
        BY_NAME[name].parse(text)
    assert str(error.value).startswith(f"--{name}: ")


@settings(max_examples=30)
@given(
    st.dictionaries(
        st.sampled_from([*BY_NAME, "other"]), st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    )
)
def test_any_mapping_in_a_file_is_read_or_refused_with_the_file_name(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, object]
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    try:
        contents = config.read_file(file)
    except ConfigError as error:
        assert str(error).startswith(f"{file}: ")  # noqa: PT017
    else:
        assert set(contents) == set(values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"clock": "virtual"},
            "--clock: virtual needs --profile: laptop-gpu, phone-npu, published, published-as-run, ",
        ),
        ({"profile": "published"}, "--profile: 'published' is for the virtual clock; add --clock virtual"),
        ({"link": "5G"}, "--link: '5G' is not one of none, lan, wifi, 5g, 4g, sat, or a link like rtt=40ms,"),
        (
            {"link": "4g,rtt=40ms,loss=2"},
            "--link: 'rtt=40ms,loss=2' has loss=2, but loss must be a number of % below 100",
        ),
        ({"clock": "virtual", "profile": "published", "cloud-url": "auto"}, "--cloud-url: is for the real clock"),
        ({"clock": "virtual", "profile": "published", "max-cpu-cores": "1"}, "--max-cpu-cores: is for the real clock"),
        ({"profile": "measure", "cloud-url": "auto"}, "--profile: measure times both sides in this process"),
        ({"clock": "virtual", "profile": "absent"}, "--profile: no profile 'absent': give a YAML file that exists, or"),
    ],
)
def test_an_option_that_does_not_fit_the_clock_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            "--gate: entropy needs the edge's model, which --drafter lookup does not run: give always or --mode los",
        ),
        ({"gate": "always,never"}, "--gate: never needs the edge's model"),
        ({"mode": "lossless", "draft-ahead": "0,4"}, "--draft-ahead: 4 needs the edge's model"),
        ({"mode": "lossless", "revise": "repeat"}, "--revise: repeat needs the edge's model"),
        ({"mode": "lossless", "draft-stop": "margin=0.3"}, "--draft-stop: margin=0.3 needs the edge's model"),
    ],
)
def test_what_needs_a_model_is_refused_with_drafter_lookup(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve({"drafter": "model,lookup"} | options)
    assert message in str(error.value)
    assert resolve({"drafter": "model+lookup"} | options).drafter == ("model+lookup",)


def test_a_profile_may_be_measured_on_either_clock() -> None:
    assert resolve({"profile": "measure"}).clock == "real"
    assert resolve({"profile": "measure", "clock": "virtual", "link": "sat"}).link == ("sat",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max-cpu-cores": "2"},
            "--max-cpu-cores: would limit the cloud too, in the same process; add --cloud-url auto",
        ),
        ({"max-memory-gb": "2", "mode": "cloud"}, "--max-memory-gb: would limit the cloud too"),
        ({"max-memory-gb": "0"}, "--max-memory-gb: '0' is not a number of GB (10^9 bytes) above 0"),
        ({"max-cpu-cores": "0.5"}, "--max-cpu-cores: '0.5' is not a whole number of at least 1"),
        ({"cloud-key-file": "key"}, "--cloud-key-file: is for a server at --cloud-url http://..."),
        ({"cloud-url": "auto", "cloud-key-file": "key"}, "--cloud-key-file: is for a server at --cloud-url http://..."),
        ({"cloud-url": "cloud:8700"}, "--cloud-url: 'cloud:8700' is not a URL of a server; give http://host:port"),
        ({"cloud-timeout": "nan"}, "--cloud-timeout: 'nan' is not a number of seconds above 0"),
        ({"on-cloud-fault": "retry"}, "--on-cloud-fault: 'retry' is not one of wait, edge, error"),
        ({"open": "early"}, "--open: 'early' is not one of eager, lazy"),
    ],
)
def test_an_option_that_does_not_fit_the_place_of_the_cloud_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"gate": "token(margin),always", "threshold": "0.5,1.5"},
            "--threshold: 1.5 is no difference of two probabilities, which --gate token(margin) reads",
        ),
        ({"own": "1"}, "--own: '1' is not a chance above 0 and below 1"),
        ({"cloud-calls": "0"}, "--cloud-calls: '0' is not a number above 0"),
        ({"cloud-budget": "1.5"}, "--cloud-budget: '1.5' is not a share above 0, at most 1"),
        ({"audit": "nan"}, "--audit: 'nan' is not a share above 0, at most 1"),
        ({"own": "0.9", "cloud-calls": "1"}, "--own: give it alone, without --cloud-calls"),
        ({"own": "0.9", "mode": "revise"}, "--own: needs --calibration"),
        (
            {"own": "0.9", "mode": "speculative", "gate": "token"},
            "--own: needs one gate of risk, and --mode speculative has token",
        ),
        (
            {"cloud-calls": "1", "gate": "risk,token"},
            "needs one gate of risk, token, token(logprob), token(margin), and",
        ),
        ({"cloud-calls": "1", "mode": "edge,lossless"}, "and --mode edge,lossless has none: give --mode revise"),
        ({"cloud-calls": "1", "mode": "revise", "send-above": "0.1,0.2"}, "--send-above: --cloud-calls chooses it"),
        ({"cloud-calls": "1", "gate": "risk", "k": "auto"}, "--k: auto needs a level that stays"),
        ({"calibration": "zh.yaml"}, "--calibration: chooses nothing alone"),
        ({"calibration": "zh.yaml", "cloud-calls": "1", "mode": "revise"}, "--calibration: zh.yaml: cannot be read"),
    ],
)
def test_a_budget_that_does_not_fit_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "rank"}, "--own: needs --rule greedy, and --rule is rank"),
        ({"send-above": "0.2"}, "--send-above: --own chooses it: leave one of them out"),
        ({"language": "english"}, "zh.yaml is for chinese, and --language is english"),
        ({"own": "", "cloud-budget": "0.001"}, "zh.yaml: 0.001 is less than any level of this gate needs, 0.03"),
    ],
)
def test_a_calibration_that_does_not_fit_is_refused(tmp_path: Path, options: dict[str, str], message: str) -> None:
    save_calibration(CALIBRATION, tmp_path / "zh.yaml")
    fitting = {"mode": "speculative", "gate": "risk", "rule": "greedy", "own": "0.8"}
    fitting["calibration"] = str(tmp_path / "zh.yaml")
    assert strategies(resolve(fitting))[0].gate.send_above == math.nextafter(0.25, 0)
    with pytest.raises(ConfigError) as error:
        resolve(fitting | options)
    assert message in str(error.value)


def test_a_calibrated_level_is_for_mode_revise_and_not_for_revise_lossless(tmp_path: Path) -> None:
    save_calibration(CALIBRATION, tmp_path / "zh.yaml")
    options = {"mode": "revise,revise-lossless", "own": "0.8", "calibration": str(tmp_path / "zh.yaml")}
    levels = [strategy.gate.send_above for strategy in strategies(resolve(options))]
    assert levels == [math.nextafter(0.25, 0), -1.0]


def test_mode_edge_may_be_limited_without_a_server() -> None:
    with pytest.raises(ConfigError, match=r"^--memory-limit: monitor needs a limit: give --max-memory-gb"):
        resolve({"memory-limit": "monitor"})
    assert resolve({"mode": "edge", "max-cpu-cores": "2", "max-memory-gb": "16"}).max_memory_gb == 16


def test_an_automatic_cloud_is_on_the_gpu_in_half_precision_if_a_gpu_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_gpu, expected in ((True, ("cuda", "float16")), (False, ("cpu", "float32"))):
        monkeypatch.setattr("torch.cuda.is_available", lambda has_gpu=has_gpu: has_gpu)
        settings = resolve({"cloud-device": "auto", "cloud-dtype": "auto"})
        assert (settings.cloud_device, settings.cloud_dtype) == expected


def test_a_list_of_links_may_contain_custom_links() -> None:
    assert resolve({"link": "lan,rtt=40ms,up=5mbit,rtt=60ms"}).link == ("lan", "rtt=40ms,up=5mbit", "rtt=60ms")


def test_the_help_of_an_option_names_its_choices_once() -> None:
    meanings = {option.name: option.meaning for option in OPTIONS}
    assert meanings["caption-type"].endswith("<language>_caption (audio_only)")
    assert meanings["gate"].endswith(
        " (entropy, margin, logprob, token, token(margin), token(logprob), risk, always, never)"
    )
