"""The report: one page that loads nothing, shows what the files say, and is readable in a real browser."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from html import escape
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from benchmarks import model, plots, providers, report, results
from benchmarks.results import Environment, Limit, Line, Results, Seconds
from llama_fast import cli
from llama_fast.ops.table import OPS

ROOT = Path(__file__).parents[1]
LIMITS = (
    Limit("copy", "byte/s", 4e10, "Tensor.copy_ of 256 MB"),
    Limit("matmul bfloat16", "flop/s", 9e11, "2048 x 2048 x 2048"),
)


def _environment(**changes: Any) -> Environment:
    made = results.environment(
        root=ROOT,
        kind="cpu",
        device="A Processor <9000>",
        memory=1 << 34,
        clocks={"now": 3000.0},
        threads=2,
        allocator="freed memory is kept",
        isa="avx512bf16",
    )
    return dataclasses.replace(made, **changes)


def _line(op: str, case: dict[str, Any], provider: str, direction: str, ms: float, **changes: Any) -> Line:
    line = Line(
        op=op,
        label="llama-3.2-1b",
        case=case,
        dtype="bfloat16",
        direction=direction,
        provider=provider,
        status="measured",
        reason="",
        seconds=Seconds(ms / 1e3, ms * 0.97 / 1e3, ms * 1.06 / 1e3, 40),
        bytes=40_000_000,
        flops=0,
        limit=None,
        share=None,
        peak_bytes=9_000_000,
        kept_bytes=None if direction == "forward" else int(4e6 * ms),
        error=None,
        tokens=None,
        command=f"llama-fast bench --op {op} --case '{op} bfloat16'",
    )
    return results.against(dataclasses.replace(line, **changes), LIMITS)


def made_up() -> Results:
    """Two ops as they come from a machine: several lengths, providers that are wrong, and some that did not run."""
    lines = []
    for direction, factor in (("forward", 1.0), ("forward+backward", 3.2)):
        for T in (512, 1024, 2048, 4096):
            case = {"B": 1, "T": T, "S": T, "H": 32, "G": 8, "D": 64}
            work = {"flops": int(2e6 * T * T * factor / 512)}
            for provider, slower in (
                ("llama_fast:cpu", 1),
                ("eager", 3.4),
                ("sdpa:flash", 2.7),
                ("torch.compile", 3.1),
            ):
                ms = factor * slower * T * T / 512**2
                lines.append(_line("attention", case, provider, direction, ms, **work))
            for provider, status, reason in (
                ("xformers", "not run", "runs on cuda only"),
                ("sdpa:math", "wrong", "dq: largest error 3 exceeds 0.1 <by far>"),
            ):
                gone = {"status": status, "reason": reason, "seconds": None}
                lines.append(_line("attention", case, provider, direction, 1.0, **gone, **work))
        for R, C in ((4096, 4096), (2048, 8192), (1, 4096)):
            for provider, slower in (("llama_fast:cpu", 1), ("eager", 7.5), ("transformers", 9.0)):
                ms = 1.9 * factor * slower * R * C / 4096**2
                lines.append(_line("rms_norm", {"R": R, "C": C}, provider, direction, ms))
    return Results(results.FORMAT, _environment(), LIMITS, tuple(lines))


def gpu() -> Results:
    """A training step on a GPU whose published figures are known."""
    case = {"B": 4, "T": 2048, "L": 4, "C": 8192}
    work = {"flops": int(8192 * 2e10), "bytes": 0, "tokens": 8192, "label": "llama-65b"}
    lines = [
        _line("training_step", case, p, "step", ms, **work)
        for p, ms in (("llama_fast:recompute-cheap", 300.0), ("llama_fast:save", 290.0), ("transformers", 420.0))
    ]
    return Results(results.FORMAT, _environment(device="NVIDIA H100 80GB HBM3", kind="cuda"), LIMITS, tuple(lines))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the page, the folder of pictures) of both."""
    folder = tmp_path_factory.mktemp("report")
    results.write(made_up(), folder / "a processor.json")
    results.write(gpu(), folder / "gpu.json")
    out, pictures = folder / "report.html", folder / "png"
    report.write([folder / "a processor.json", folder / "gpu.json"], out, pictures)
    return out, pictures


def test_the_page_loads_nothing_and_is_small(page: tuple[Path, Path]) -> None:
    text = page[0].read_text()
    assert len(text) < 2_000_000
    assert not re.findall(r"(?:src|href|action)=[\"'](?!#)[^\"']*", text)
    assert not re.findall(r"https?:|@import|url\((?![\"']?#)", text)
    assert "<script" not in text


def test_the_page_shows_what_the_files_say(page: tuple[Path, Path]) -> None:
    text = page[0].read_text()
    for r in (made_up(), gpu()):
        assert escape(r.environment.device) in text
        assert r.environment.commit is not None
        assert r.environment.commit in text
        assert escape(r.environment.allocator) in text
        for x in r.lines:
            assert escape(x.command) in text, "each line can be measured again"
            assert escape(x.provider) in text.replace("<wbr>", "")
            assert x.sizes in text
    assert "WRONG: dq: largest error 3 exceeds 0.1 &lt;by far&gt;" in text
    assert "<b>xformers</b>: runs on cuda only (8 lines)" in text
    assert "A Processor <9000>" not in text
    assert "limit: matmul bfloat16" in text
    assert text.count("MFU: tokens/s x (6 N + 12 L H D T) / peak flop/s.") == 1
    assert text.count("380 tokens a second and GPU on A100") == 1
    # 8192 tokens in 300 ms, 2e10 flop each, of 989.4e12 flop/s
    assert "<small>27,307 tok/s</small><small>55.2% MFU</small>" in text


def test_ours_is_compared_with_eager_and_with_the_fastest(page: tuple[Path, Path]) -> None:
    text = page[0].read_text()
    row = re.search(r'<tr><th><a href="#attention">.*?</tr>', text)
    assert row is not None
    assert re.findall(r"<td>(.*?)</td>", row[0])[:2] == ["3.40x", "2.70x"]
    lines = [x for x in made_up().lines if x.op == "attention" and x.direction == "forward"]
    speedup = next(p for p in plots.all_plots(lines, "a", "A Processor") if p.name == "a_forward_speedup")
    assert speedup.svg.count("3.40x eager") == 4
    assert speedup.svg.count("2.70x sdpa:flash") == 4


def test_a_card_compares_with_the_fastest_of_ours_and_shows_what_there_is(page: tuple[Path, Path]) -> None:
    text = page[0].read_text()
    card = next(x for x in re.findall("<article.*?</article>", text) if "<b>bf16</b> step" in x)
    assert "<td>1.45x</td>" in card, "420 ms over the 290 of the faster policy"
    assert f"<small>{int(4e6 * 300) / 8192:,.0f} B/tok/layer</small>" in card
    assert "163,840.0 Gflop at least; limit: matmul bfloat16" in card, "no bytes are said to move"
    alone = [dataclasses.replace(x, kept_bytes=None, peak_bytes=None) for x in gpu().lines]
    small = report.build([("a", Results(results.FORMAT, _environment(), LIMITS, tuple(alone)))])[0]
    assert "<th>kept</th>" in card
    assert "<th>kept</th>" not in small, "nobody's memory is known"


def test_wrong_lines_are_counted_in_the_overview(page: tuple[Path, Path]) -> None:
    overview = page[0].read_text().partition("</section>")[0]
    (row,) = (x for x in re.findall("<tr>.*?</tr>", overview) if " wrong</td>" in x)
    assert 'href="#attention"' in row
    assert row.endswith("<td class='wrong'>8 wrong</td></tr>")


def test_a_comparison_says_whose_ratios_it_shows() -> None:
    r = made_up()
    versions = dataclasses.replace(r, environment=_environment(against="c0ffee" + "0" * 34))
    assert "The other version is commit c0ffee000000." in report.build([("ab", versions)])[0]
    assert "The other version" not in report.build([("a", r)])[0]


def test_each_plot_is_on_the_page_and_a_picture(page: tuple[Path, Path]) -> None:
    text, pictures = page[0].read_text(), sorted(page[1].glob("*.png"))
    names = [p.stem for p in pictures]
    for kind in ("forward_speedup", "forward_time", "forward_share", "forward_backward_time", "memory_by_length"):
        assert f"a_processor_attention_{kind}" in names
    assert not any("rms_norm_memory_by_length" in n for n in names), "no case of it differs in length alone"
    assert text.count("<svg ") == text.count("<figure ") == len(names)
    for path in pictures:
        assert f"<figure id='{path.stem}'>" in text
        with Image.open(path) as picture:
            assert picture.width > 700
            assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 10, "something is drawn"
    assert "#010101" not in text
    assert "#020202" not in text


def test_nothing_is_cut_off_at_the_edge_of_a_picture(page: tuple[Path, Path]) -> None:
    _, pictures = page
    for path in pictures.glob("*.png"):
        with Image.open(path) as image:
            grey, (w, h) = image.convert("L"), image.size
        for edge in ((0, 0, w, 2), (0, h - 2, w, h), (0, 0, 2, h), (w - 2, 0, w, h)):
            assert grey.crop(edge).getextrema() == (255, 255), f"{path.name}: {edge}"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_two_providers_of_an_op_have_one_colour(device: str) -> None:
    found = {op: [p.name for p in providers.of(op, device)] for op in OPS}
    found |= {op: list(model.providers(op)) for op in ("block", "training_step", "lora_step", "decode")}
    for op, names in found.items():
        assert len({plots._color(name, names) for name in names}) == len(names), op


def test_ids_are_not_used_twice(page: tuple[Path, Path]) -> None:
    text = page[0].read_text()
    ids = re.findall(r"\bid=[\"'](.*?)[\"']", text)
    used = set(re.findall(r"url\(#(.*?)\)", text)) | set(re.findall(r'href="#(.*?)"', text))
    assert used <= set(ids)
    assert [i for i in used if ids.count(i) > 1] == []


def test_files_of_one_name_do_not_hide_each_other(tmp_path: Path) -> None:
    few = dataclasses.replace(made_up(), lines=made_up().lines[:4])
    paths = [tmp_path / folder / f"{name}.json" for folder, name in (("a", "ops"), ("b", "ops"), ("b", "OPS"))]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        results.write(few, path)
    out, *pictures = report.write(paths, tmp_path / "r.html", tmp_path / "png")
    assert len(set(pictures)) == len(pictures) == len(list((tmp_path / "png").iterdir()))
    text = out.read_text(encoding="utf-8")
    figures = re.findall(r"<figure id='(.*?)'>", text)
    assert len(set(figures)) == len(figures) == len(pictures)
    assert [text.count(f"<h3>{name}</h3>") for name in ("ops", "ops-2", "OPS-3")] == [1, 1, 1]


def test_a_result_file_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    results.write(gpu(), path)
    before = path.read_bytes()
    (tmp_path / "x").mkdir()
    with pytest.raises(ValueError, match=r"a.json: is one of the result files, expected another file for the page"):
        report.write([path], tmp_path / "x" / ".." / "a.json")
    assert path.read_bytes() == before


def test_the_page_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    results.write(gpu(), tmp_path / "a.json")
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; from benchmarks import report; "
        f"report.write([Path('a.json')], Path('r.html'))"
    )
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, **plain}, check=True)
    assert "\u2013" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_the_same_lines_give_the_same_plots() -> None:
    lines = gpu().lines
    assert plots.all_plots(lines, "a", "A Processor") == plots.all_plots(lines, "a", "A Processor")


@pytest.mark.parametrize(
    "ms", [(94.7, 112), (6.25, 16.9), (31.1, 40.4), (2.1, 4.9), (0.5, 3), (1e-3, 0.9), (0.01, 900), (3, 3)]
)
def test_a_logarithmic_axis_has_two_numbers_or_more(ms: tuple[float, float]) -> None:
    figure = Figure()
    axis = figure.add_subplot()
    axis.plot(ms, (0, 1), "o")
    plots._log(axis.set_xscale, axis.xaxis)
    low, high = axis.get_xlim()
    shown = [x for x in axis.get_xticks() if low <= x <= high]
    assert 2 <= len(shown) <= 9, shown


def test_a_range_has_one_unit() -> None:
    assert plots.range_text(0.00301, 0.00329) == "3.01–3.29 ms"
    assert plots.range_text(0.98e-3, 0.0123) == "0.98–12.3 ms"


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.2e-5, "42 µs"), (3e-7, "0.3 µs")]
)
def test_times_have_three_digits(seconds: float, text: str) -> None:
    assert plots.time_text(seconds) == text


def test_the_command_and_its_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source, out = tmp_path / "a.json", tmp_path / "r.html"
    results.write(Results(results.FORMAT, _environment(), LIMITS, made_up().lines[:4]), source)

    def call(*args: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["llama-fast", "report", *args])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out + captured.err

    status, text = call(str(source), "-o", str(out), "--png", str(tmp_path / "png"))
    assert status == 0, text
    assert "pictures in" in text
    assert out.read_text().startswith("<!DOCTYPE html>")
    source.write_text("{}")
    status, text = call(str(source), "-o", str(tmp_path / "other.html"))
    assert (status, text) == (2, f"llama-fast: {source}: format is None, expected 'llama_fast results 1'\n")
    assert not (tmp_path / "other.html").exists()


# ---- in a browser ---------------------------------------------------------------------------------------------------
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt install chromium")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=3000"),
]


def _browse(folder: Path, *arguments: str) -> str:
    """What Chromium prints, started on an empty profile."""
    profile = folder / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@needs_browser
@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_screen(page: tuple[Path, Path], tmp_path: Path, width: int) -> None:
    """In a frame as wide as the screen; what is wider than it is named."""
    script = """
      const d = document.querySelector('iframe').contentDocument, wide = [];
      for (const e of d.body.querySelectorAll('*'))
        if (!e.closest('svg') && e.getBoundingClientRect().right > d.documentElement.clientWidth + 1)
          wide.push(e.tagName + ':' + e.textContent.slice(0, 40));
      let small = 99;
      for (const e of d.querySelectorAll('svg text'))
        small = Math.min(small, e.getBoundingClientRect().height);
      const figures = d.querySelectorAll('svg').length;
      document.title = JSON.stringify({wide: wide.slice(0, 5), small: small, figures: figures});
    """
    frame = f'<iframe srcdoc="{escape(page[0].read_text())}" style="width:{width}px;height:800px;border:0"></iframe>'
    outer = tmp_path / "outer.html"
    outer.write_text(f"<body>{frame}<script>onload = () => {{ {script} }}</script></body>")
    title = re.search(r"<title>(.*?)</title>", _browse(tmp_path, "--dump-dom", outer.as_uri()))
    assert title is not None
    found = json.loads(title[1])
    assert found["wide"] == []
    assert found["figures"] > 8
    assert found["small"] >= 9, "letters of plots in pixels"


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark_are_readable(page: tuple[Path, Path], tmp_path: Path, dark: bool) -> None:
    """Background and ink are far apart in both, and the page is as dark as it was asked to be."""
    picture = tmp_path / "shot.png"
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
    _browse(tmp_path, f"--screenshot={picture}", "--window-size=1000,1400", *scheme, page[0].as_uri())
    with Image.open(picture) as found:
        gray = found.convert("L")
        histogram = gray.histogram()
        background = max(range(256), key=histogram.__getitem__)
        assert (background < 60) == dark
        ink = sum(histogram[170:]) if dark else sum(histogram[:90])
        assert ink > 2000, "letters stand out from the background"


@needs_browser
def test_it_prints(page: tuple[Path, Path], tmp_path: Path) -> None:
    pdf = tmp_path / "report.pdf"
    _browse(tmp_path, f"--print-to-pdf={pdf}", page[0].as_uri())
    assert pdf.read_bytes().startswith(b"%PDF")
    assert pdf.read_bytes().count(b"/Type /Page\n") + pdf.read_bytes().count(b"/Type /Page/") >= 2
