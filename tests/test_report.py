"""The page about a saved cache: its numbers are the cache's, and its own JavaScript keeps what `keep_mask` keeps."""

import base64
import html
import json
import re
import shutil
import subprocess
import time
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

import kvzip
import random_model
from kvzip import refitting
from kvzip.cache import DenseCache, DenseKV, Scores, load_cache
from kvzip.options import Refitting
from kvzip.report import answered, describe, kept_mask, render, write_report
from kvzip.sources import PASSAGE, passages, texts_of

TEXT = "Happy families <b>are</b> all alike;\n</script><script>alert('é 日本')</script><!-- every\n\nunhappy 🎉 family."
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LEVELS = ("pair", "layer", "uniform", "head")
RATIOS = (0.05, 0.07, 0.1, 0.29, 0.3, 0.33, 0.5, 0.58, 0.77, 0.99, 1.0)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium to run the page in: apt-get install chromium")


@pytest.fixture(scope="module")
def saved(model, scored, tmp_path_factory):
    """A compressed cache with a turn after it, its file, and the page of that."""
    path = tmp_path_factory.mktemp("report") / "doc.kvz"
    cache = kvzip.ask(model, kvzip.compress(scored, 0.3), "Who is?", max_tokens=3)[1]
    note = {"title": "Anna <Karenina>", "documents": ["a.md", "b.md"], "seconds": {"prefill": 1.25}}
    kvzip.save(cache, path, model=model, score_bits=8, note=note)
    write_report(path, path.with_suffix(".html"))
    return load_cache(path), path, path.with_suffix(".html").read_text(encoding="utf-8")


def block(page, name):
    (found,) = re.findall(rf'<script type="[a-z/]+" id="{name}">(.*?)</script>', page, re.DOTALL)
    return found


def array(page, name, dtype):
    return np.frombuffer(zlib.decompress(base64.b64decode(block(page, name))), dtype)


def in_chromium(page, path, script):
    """What `script`, the body of an async function that runs in the page when it is ready, returns."""
    ask = f"""<script>
        report.ready.then(async () => {{ {script} }}).catch((error) => ({{ error: String(error) }})).then((value) => {{
            const answer = Object.assign(document.createElement("pre"), {{ id: "answer" }});
            answer.textContent = JSON.stringify(value);
            document.body.replaceChildren(answer);
        }});
    </script></body>"""
    path.write_text(page.replace("</body>", ask), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --virtual-time-budget=20000 --window-size=1000,800 --dump-dom"
    home = path.parent / f"{path.stem}-profile"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={home}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    found = re.search(r'<pre id="answer">(.*?)</pre>', done.stdout.decode(), re.DOTALL)
    assert found, "the page was not ready in time"
    answer = json.loads(html.unescape(found[1]))
    assert not (isinstance(answer, dict) and "error" in answer), answer
    return answer


def test_the_numbers_in_the_page_are_those_of_the_cache(saved, scored):
    cache, path, page = saved
    facts = json.loads(block(page, "facts"))
    shape = tuple(cache.scores.values.shape)
    codes, levels = array(page, "codes", "u1").reshape(shape), array(page, "levels", "<f4")
    assert np.array_equal(levels[codes], cache.scores.values.numpy())
    assert np.array_equal(array(page, "ids", "<i4"), cache.token_ids.numpy())
    kept = np.unpackbits(array(page, "kept", "u1"), bitorder="little")[: codes.size].reshape(shape)
    assert np.array_equal(kept, kvzip.keep_mask(scored.scores, 0.3).numpy()) and kept.sum() == cache.kept
    texts = [facts["texts"][n] for n in array(page, "texts", "<i4")]
    assert "".join(texts[cache.start : cache.context_length]) == TEXT
    assert (facts["kept"], facts["total"], facts["start"], facts["length"]) == (
        cache.kept,
        cache.total,
        cache.start,
        cache.context_length,
    )
    assert facts["layers"] == [0, 2] and facts["windows"] == 1 and facts["level"] == "pair"
    assert (
        facts["fileBytes"] == path.stat().st_size
        and ["seconds prefill", 1.25] in facts["note"]
        and ["documents", "a.md, b.md"] in facts["note"]
    )
    assert facts["cacheBytes"] == kvzip.nbytes(cache) and facts["fullBytes"] == kvzip.nbytes(scored)


def test_the_page_needs_nothing_else_and_its_data_stay_data(saved):
    _, _, page = saved
    assert "<" not in block(page, "facts") and "<title>Anna &lt;Karenina&gt; · kvzip</title>" in page
    code = re.sub(r'<script type=".*?</script>', "", page, flags=re.DOTALL)
    assert not re.search(r"https?:|\bsrc=|\burl\(|@import|\bfetch\(|<link", code)
    assert "default-src 'none'" in code


@pytest.mark.parametrize("bits", [None, 8])
def test_what_is_kept_is_what_the_pairs_held_are(model, scored, bits):
    for way in ({"ratio": 0.4, "level": "uniform"}, {"budget": 9.0, "protect": [(3, 9)]}, {"ratio": 1.0}):
        small = kvzip.compress(scored, **way, bits=bits)
        assert torch.equal(kept_mask(small), kvzip.keep_mask(scored.scores, **way))
    assert kept_mask(scored).all() and kept_mask(scored).shape == scored.scores.values.shape


@pytest.mark.parametrize("case", ["whole", "none", "other heads", "no numbers", "out of range"])
def test_the_page_of_a_fit_says_what_attention_is_kept(model, scored, tmp_path, case):
    """Of a note that is not of this cache it says nothing."""
    path, out = tmp_path / "doc.kvz", tmp_path / "page.html"
    small, mass = refitting.refit_and_measure(model, scored, kvzip.compress(scored, 0.3), Refitting())
    told = refitting.note_of(mass)
    kvzip.save(
        small,
        path,
        note={
            "whole": {"mass_kept": told},
            "none": {},
            "other heads": {"mass_kept": {name: rows[:1] for name, rows in told.items()}},
            "no numbers": {"mass_kept": {"before": [["<b>"]], "after": told["after"]}},
            "out of range": {"mass_kept": told | {"before": [[1e300] * len(row) for row in told["before"]]}},
        }[case],
    )
    write_report(path, out)
    facts = json.loads(block(out.read_text(encoding="utf-8"), "facts"))
    assert facts["biases"] and facts["level"] == "pair" and facts["note"] == []
    assert facts["mass"] == (told if case == "whole" else None)
    if case == "whole":
        assert torch.tensor(told["after"]).mean() > torch.tensor(told["before"]).mean()


@needs_chromium
def test_the_page_shows_what_a_fit_gave_each_head(model, scored, tmp_path):
    """As long as it shows the pairs of the file; another ratio has not been fitted."""
    small, mass = refitting.refit_and_measure(model, scored, kvzip.compress(scored, 0.3), Refitting())
    kvzip.save(small, tmp_path / "doc.kvz", note={"mass_kept": refitting.note_of(mass)})
    write_report(tmp_path / "doc.kvz", tmp_path / "page.html")
    page, other = (tmp_path / "page.html").read_text(encoding="utf-8"), tmp_path / "shown.html"
    answer = in_chromium(
        page,
        other,
        """
        const $ = (id) => document.getElementById(id), found = [], table = $("facts-table").textContent;
        const point = (n) => {
            const place = $("map").getBoundingClientRect(), { step, tall } = report.state.cells;
            const [x, y] = [step * ((n >> 1) + 0.5), tall * ((n & 1) + 0.5)];
            $("map").dispatchEvent(new PointerEvent("pointermove",
                { pointerType: "mouse", bubbles: true, clientX: place.left + x, clientY: place.top + y }));
            return $("cell").textContent;
        };
        for (let n = 0; n < 4; n++) found.push(point(n));
        report.setRatio(0.2);
        return { found, table, moved: point(3) };
        """,
    )
    before, after = (x.double() for x in (mass.before, mass.after))

    def said(x):
        return f"{x:.1%}" if 0 < x < 0.0995 else f"{x:.0%}"

    told = [round(x, 4) for x in (*before.flatten().tolist(), *after.flatten().tolist())]
    for n, text in enumerate(answer["found"]):
        assert text.endswith(f", {said(told[n])} of its attention, {said(told[n + 4])} with biases"), text
    means = [said(sum(told[at : at + 4]) / 4) for at in (0, 4)]
    assert f"Attention kept{means[0]}, {means[1]} with biases, in the mean head" in answer["table"]
    assert "with a bias for each row" in answer["table"]
    assert answer["moved"].startswith("layer\xa02 head\xa01: ") and "attention" not in answer["moved"]


def test_files_without_scores_text_or_model_have_a_page_too(model, scored, tmp_path):
    path, out = tmp_path / "doc.kvz", tmp_path / "page.html"
    for cache in (kvzip.prefill(model, TEXT), kvzip.compress(scored, 0.3, level="layer", bits=4)):
        kvzip.save(replace(cache, scores=None), path, overwrite=True)
        write_report(path, out)
        page = out.read_text(encoding="utf-8")
        facts = json.loads(block(page, "facts"))
        assert 'id="codes"' not in page and not facts["hasText"] and facts["model"] == "" and facts["title"] == "doc"
        texts = [facts["texts"][n] for n in array(page, "texts", "<i4")]
        assert texts == [f"⟨{i}⟩" for i in cache.token_ids.tolist()]
    assert facts["level"] == "layer" and facts["bits"] == 4
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path / "absent.kvz", out)
    before = out.read_bytes()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="truncated or tampered"):
        write_report(path, out)
    assert out.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_a_name_and_a_note_that_are_no_text_have_a_page_too(scored, tmp_path):
    path, page = tmp_path / "bad\udcff.kvz", tmp_path / "page.html"
    kvzip.save(kvzip.compress(scored, 0.3), path, note={"by": "\ud800"})
    write_report(path, page)
    facts = json.loads(block(page.read_text(encoding="utf-8"), "facts"))
    assert (facts["file"], facts["title"]) == (r"bad\udcff.kvz", r"bad\udcff")


def tied(text):
    """A text of the page with plain spaces where no line may break."""
    return text.replace("\u00a0", " ")


@needs_chromium
def test_the_page_tells_what_is_saved_kept_and_answered(model, scored, tmp_path):
    path, out = tmp_path / "doc.kvz", tmp_path / "doc.html"
    cache = kvzip.compress(scored, 0.1)
    kvzip.save(cache, path, model=model, score_bits=8)
    answers = answered(model, cache, ["Who <b>?", "How many?"], max_tokens=4)
    full = kvzip.generate(model, scored, ["Who <b>?", "How many?"], max_tokens=4)
    small = kvzip.generate(model, cache, ["Who <b>?", "How many?"], max_tokens=4, sources=3)
    assert [(a.full, a.small, a.sources) for a in answers] == [
        (f.text, s.text, s.sources) for f, s in zip(full, small, strict=True)
    ]
    answers[1] = replace(answers[1], small=answers[1].full)
    write_report(path, out, answers=answers)
    told = in_chromium(
        out.read_text(encoding="utf-8"),
        tmp_path / "page.html",
        """
        const $ = (id) => document.getElementById(id), text = (x) => x.textContent;
        const shades = Array.from(document.querySelectorAll(".t"), (x) => Number(x.style.getPropertyValue("--kept")));
        const kept = Array.from(report.state.byToken);
        const links = document.querySelectorAll(".source");
        links[0].click();
        const cited = Array.from(document.querySelectorAll(".cited"), (x) => x.index);
        return { headline: text($("headline")), asked: text($("asked")), links: links.length, cited, shades, kept,
            at: document.activeElement.index, passages: report.passages(),
            strongest: $("strongest").children.length, weakest: $("weakest").children.length,
            bold: document.querySelectorAll("b b").length };
        """,
    )
    sizes = f"{kvzip.nbytes(scored) / 1e3:.0f} kB \u2192 {kvzip.nbytes(cache) / 1e3:.1f} kB"
    headline = tied(told["headline"])
    part = 100 * cache.kept / cache.total
    assert headline.startswith(f"{sizes}: {part:.0f}%") or headline.startswith(f"{sizes}: {part:.1f}%"), headline
    assert f"{1 + (answers[0].full == answers[0].small)} of 2 answers are the same, each in " in headline
    assert "Who <b>?" in told["asked"] and told["bold"] == 0 and "full and compressed: " in told["asked"]
    first = answers[0].sources[0]
    assert told["links"] == 6 and told["cited"] == list(range(first.start, first.stop)) and told["at"] == first.start
    order = np.argsort(told["kept"], kind="stable")
    shades = np.array(told["shades"])[order]
    assert (np.diff(shades) >= 0).all() and shades[-1] == 1 and shades[np.array(told["kept"])[order] == 0].max() == 0
    pieces = texts_of(model.tokenizer, cache.token_ids[cache.start :].tolist())
    spans = [(a + cache.start, b + cache.start) for a, b in passages(pieces)]
    assert told["passages"] == [list(span) for span in spans if span[1] - span[0] >= PASSAGE[0]]
    assert told["strongest"] == told["weakest"] >= 1


@needs_chromium
def test_the_slider_keeps_what_keep_mask_keeps(saved, tmp_path):
    cache, _, page = saved
    asked = [(level, ratio) for level in LEVELS for ratio in RATIOS]
    answer = in_chromium(
        page,
        tmp_path / "page.html",
        f"""
        const counts = () => [Array.from(report.state.byHead), Array.from(report.state.byToken), report.state.kept];
        const saved = counts();
        const rest = {json.dumps(asked)}.map(([level, ratio]) => {{
            report.state.facts.level = level;
            report.setRatio(ratio);
            return counts();
        }});
        return [saved, ...rest];
        """,
    )

    def counts(mask):
        return [mask.sum(-1).flatten().tolist(), mask.sum((0, 1)).tolist(), int(mask.sum())]

    assert answer[0] == counts(kept_mask(cache))
    for (level, ratio), found in zip(asked, answer[1:], strict=True):
        assert found == counts(kvzip.keep_mask(cache.scores, ratio, level=level)), (level, ratio)


@needs_chromium
def test_tokens_are_shaded_and_reached_by_keys_and_the_slider_by_hand(saved, tmp_path):
    cache, _, page = saved
    answer = in_chromium(
        page,
        tmp_path / "page.html",
        """
        const $ = (id) => document.getElementById(id), slider = $("ratio");
        const folded = [$("fold").textContent, document.querySelectorAll(".t").length];
        report.setShading(false);
        $("fold").click();
        const each = (of) => Array.from($("document").querySelectorAll(".t"), of);
        const shades = () => each((x) => x.style.getPropertyValue("--kept"));
        const text = each((x) => x.textContent).join("");
        const press = (key) =>
            document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
        const saved = shades();
        const hover = (on, type, more) => on.dispatchEvent(
            new PointerEvent(type, { pointerType: "mouse", bubbles: true, ...more }));
        hover(document.querySelectorAll(".t")[5], "pointerover");
        const place = $("map").getBoundingClientRect(), { step, tall } = report.state.cells;
        const grid = $("grid").getContext("2d"), scale = devicePixelRatio; // one color for each layer and head
        const cells = Array.from({ length: 4 }, (_, n) => Array.from(grid.getImageData(
            Math.round((step * (n >> 1) + step / 2) * scale), Math.round((tall * (n & 1) + tall / 2) * scale), 1, 1,
        ).data).join());
        const pointed = [$("piece").textContent, $("where").textContent, $("grid").hidden, cells];
        hover($("map"), "pointermove", { clientX: place.left + 1.5 * step, clientY: place.top + 0.5 * tall });
        const head = $("cell").textContent;
        $("document").focus();
        const walk = [];
        const keys = ["Down", "Right", "Right", "Left", "Down", "Up"].map((name) => `Arrow${name}`);
        for (const key of [...keys, "End", "Home"]) {
            press(key);
            walk.push(document.activeElement.index);
        }
        slider.value = 0.6;
        slider.dispatchEvent(new Event("input"));
        await new Promise((done) => setTimeout(done, 200));
        return { text, saved, pointed, folded, head, walk, moved: shades(), status: $("status").textContent,
            spoken: slider.ariaValueText ?? slider.getAttribute("aria-valuetext"),
            label: document.activeElement.getAttribute("aria-label"),
            table: $("facts-table").textContent, chosen: document.querySelectorAll("[aria-selected]").length };
        """,
    )
    inside = slice(cache.start, cache.context_length)

    def shades(mask):
        return [f"{x:.3f}" for x in mask.float().mean((0, 1)).tolist()]

    assert answer["text"].count(TEXT) == 1
    assert [f"{float(x):.3f}" for x in answer["saved"][inside]] == shades(kept_mask(cache))
    mask = kept_mask(cache)
    piece, where, hidden, cells = answer["pointed"]
    at, held = 5 - cache.start, mask[:, :, 5 - cache.start].flatten().tolist()
    where, label, head = (tied(text) for text in (where, answer["label"], answer["head"]))
    assert piece == TEXT[at].replace(" ", "\u2423") and f"kept in {sum(held)} of 4" in where and not hidden
    fold, shown = answer["folded"]
    assert f"{cache.start} token of the prompt" in fold and shown <= len(cache.token_ids) - cache.start
    full = {cell for cell, kept in zip(cells, held, strict=True) if kept}
    assert len(full) <= 1 and full.isdisjoint(cell for cell, kept in zip(cells, held, strict=True) if not kept)
    tokens = int(mask[1, 0].sum())
    assert head.startswith("layer 2 head 0: ") and f" {tokens} of {mask.shape[2]} tokens" in head
    moved = kvzip.keep_mask(cache.scores, 0.6)
    assert [f"{float(x):.3f}" for x in answer["moved"][inside]] == shades(moved)
    assert f"{int(moved.sum()):,} of {moved.numel():,} pairs would be kept" in tied(answer["status"])
    assert answer["spoken"].startswith("60%: ")
    *steps, below, back, last, first = answer["walk"]
    assert steps == [0, 1, 2, 1] and below > 2 and back < below and (last, first) == (len(cache.token_ids) - 1, 0)
    assert "token 0, id" in label and answer["chosen"] == 1
    assert "Time to prefill1.25 s" in answer["table"] and "random, float32" in answer["table"]


@needs_chromium
def test_no_text_becomes_markup_and_a_phone_scrolls_in_one_direction(model, tmp_path):
    """Text, title and note try to run as scripts, and are as wide as they can; the page is in a frame of 320 pixels."""
    attack = "</title></script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>" + "W" * 300
    path, out = tmp_path / "doc.kvz", tmp_path / "out.html"
    cache = kvzip.compress(kvzip.score(model, kvzip.prefill(model, f"<!--<script>{attack}\u202e\u2028")), 0.3)
    kvzip.save(cache, path, model=model, score_bits=8, note={"title": attack, attack: attack})
    write_report(path, out)
    ask = """<script>report.ready.then(() => {
        const wide = (x) => x.getBoundingClientRect().right > innerWidth + 1, root = document.documentElement;
        report.focusToken(9);
        parent.postMessage({
            hacked: "hacked" in window, images: document.images.length, scripts: document.scripts.length,
            heading: document.getElementById("title").textContent, width: innerWidth,
            sideways: root.scrollWidth - root.clientWidth,
            wide: Array.from(document.body.querySelectorAll("*")).filter(wide).length,
        }, "*");
    });</script></body>"""
    framed = html.escape(out.read_text(encoding="utf-8").replace("</body>", ask))
    page = f"""<body><iframe style="width: 320px; height: 700px; border: 0" srcdoc="{framed}"></iframe><script>
        const told = new Promise((resolve) => addEventListener("message", (event) => resolve(event.data)));
        const report = {{ ready: told }};
    </script></body>"""
    answer = in_chromium(page, tmp_path / "page.html", "return await told;")
    # what is left of its scripts: the facts, the page's own and the one that asks
    assert not answer["hacked"] and answer["images"] == 0 and answer["scripts"] == 3
    assert answer["heading"] == attack
    assert (answer["width"], answer["sideways"], answer["wide"]) == (320, 0, 0)


def long_page(length):
    """The page of a document of 28 layers and 4 heads, as Qwen2.5-7B has, and its number of pairs."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(28, 4, length, generator=generator) ** 8
    ids = torch.randint(0, 5_000, (length,), generator=generator)
    empty = torch.zeros(1, 4, length, 1, dtype=torch.float16)
    scores = Scores(values, tuple(range(28)), 0, length, "kvzip-context")
    cache = DenseCache([DenseKV(empty, empty)] * 28, length, 0, False, ids, "none", scores)
    pieces = {i: b"\n\n" if i < 20 else f" word{i}".encode() for i in range(5_000)}
    facts, arrays = describe({"version": [1, 2], "layers": [], "note": {"title": "long"}}, cache, pieces)
    return "".join(render(facts | {"file": "long.kvz", "fileBytes": 1}, arrays)), values.numel()


TO_THE_END = """
    const spans = () => document.querySelectorAll(".t").length, first = spans();
    report.focusToken(report.state.ids.length - 1);
    await new Promise((done) => setTimeout(done, 300));
    report.setRatio(0.3);
    return [report.state.kept, first, spans(), document.querySelectorAll(".block").length];
"""


@needs_chromium
def test_of_a_hundred_thousand_tokens_only_what_is_near_the_window_is_in_the_page(tmp_path):
    page, pairs = long_page(100_000)
    kept, first, later, blocks = in_chromium(page, tmp_path / "page.html", TO_THE_END)
    assert kept == int(0.3 * pairs) and blocks > 250
    assert 100 < first < 10_000 and 100 < later < 10_000


@needs_chromium
@pytest.mark.slow  # a fact of time: on an idle machine
def test_a_hundred_thousand_tokens_are_there_in_three_seconds(tmp_path):
    """The time is what it takes beyond a short page, the least of three runs: both start a browser."""
    least = {}
    for length in (200, 100_000):
        page, _ = long_page(length)
        seconds = []
        for run in range(3):
            start = time.perf_counter()
            in_chromium(page, tmp_path / f"{length}-{run}.html", TO_THE_END)
            seconds.append(time.perf_counter() - start)
        least[length] = min(seconds)
    assert least[100_000] - least[200] < 3, least


def test_a_cache_of_windows_has_nothing_to_show(tmp_path):
    model = random_model.make(random_model.config(windows=(6, 6)))
    kvzip.save(kvzip.prefill(model, TEXT), tmp_path / "doc.kvz")
    with pytest.raises(ValueError, match="windows in all"):
        write_report(tmp_path / "doc.kvz", tmp_path / "page.html")
