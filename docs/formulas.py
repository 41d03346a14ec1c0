"""Formulas as MathML, which browsers set by themselves, with the names that the code gives them."""

import functools
import html
import re
from xml.etree import ElementTree

from latex2mathml.converter import convert
from lines import ROOT

CHILDREN = {"msup": 2, "msub": 2, "mfrac": 2, "munder": 2, "mover": 2, "munderover": 3}
# A row of the table of symbols in docs/*/index.md: symbols, names, meaning.
SYMBOL_ROW = re.compile(
    r"^\| (\$[^|\n]*(?:\\mid[^|\n]*)*) \| ([^|\n]*`[^|\n]*) \| ([^\n]*) \|$", re.M
)
# Symbols of the pages that the table has in another form.
FORMS = {
    r"V(s_t)": "values",
    r"V(s_{t+1})": "next_values",
    r"\hat A": "advantages",
    r"\log \pi_\theta(a_t \mid s_t)": "log_probs",
    r"\log \pi_{\text{ref}}(a_t \mid s_t)": "ref_log_probs",
    r"\varepsilon_{\text{high}}": "clip_coef_high",
    r"S_{\pi_\theta}(s_t)": "entropies",
    r"\log r_t(\theta)": "log_ratio",
    r"\delta_t": "deltas",
    r"L^{\text{CLIP}}(\theta)": "surrogate",
    r"L^{\text{CLIP}}": "surrogate",
    "r": "ratio",
}
ALIASES = {"num_steps": "T", "num_envs": "N"}  # what the code calls them too


def mathml(tex: str, display: str = "inline") -> str:
    """Return TeX as MathML. Raises `ValueError` for what the converter does not know."""
    found = convert(" ".join(html.unescape(tex).split()), display=display)
    found = found.replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>")  # \sim
    # A minus right after another sign belongs to what follows it.
    sign = r"(<mo[^>]*>(?:[\[]|&#x(?:00028|0002C|0003D|02190);)</mo>)<mo>(?=&#x02212;)"
    found = re.sub(sign, r'\1<mo form="prefix">', found)
    # LaTeX sets a thin space on either side of a function's name, but none next to a bracket.
    found = re.sub("<mo>([A-Za-z]{2,})</mo>", r"<mi>\1</mi>", found)
    space, function = '<mspace width="0.17em"/>', "<mi>[A-Za-z]{2,}</mi>"
    found = re.sub(f"(?<!<msup>)(?<!<msub>)({function})(?!(?:<mrow>)?<mo|</)", rf"\1{space}", found)
    before = "</(?:mi|mn|mrow|mstyle|msub|msup)>"
    found = re.sub(f"({before})(?=(?:<msu[bp]>)?{function})", rf"\1{space}", found)
    if "\\" in found or not well_formed(found):
        raise ValueError(f"no MathML for {tex}")
    return found


def well_formed(text: str) -> bool:
    try:
        elements = list(ElementTree.fromstring(text).iter())
    except ElementTree.ParseError:
        return False
    return all(len(e) == CHILDREN.get(e.tag.partition("}")[2], len(e)) for e in elements)


@functools.cache
def symbols(language: str) -> dict[str, tuple[str, str]]:
    """Return (name in the code, meaning in Markdown) by TeX, from the table of symbols."""
    found = {}
    for tex, code, meaning in SYMBOL_ROW.findall((ROOT / f"docs/{language}/index.md").read_text()):
        signs = [s for part in re.findall(r"\$(.+?)\$", tex) for s in re.split(r", (?!.*\))", part)]
        names = re.findall(r"`([^`]+)`", code)
        for sign, name in zip(signs, names):
            if re.fullmatch(r"[\w.]+", name):
                found[sign] = (name.rpartition(".")[2], meaning)
    for sign, name in FORMS.items():
        meanings = [meaning for known, meaning in found.values() if known == name]
        found.setdefault(sign, (name, meanings[0] if meanings else ""))
    return found


@functools.cache
def pieces(language: str) -> dict[str, str]:
    """Return the names in the code by the MathML of a symbol, as it stands within a formula."""
    found = {}
    for tex, (name, _) in symbols(language).items():
        inner = re.fullmatch(r"<math[^>]*><mrow>(.*)</mrow></math>", mathml(tex))
        if inner:
            found[inner[1]] = f"{name} {ALIASES[name]}" if name in ALIASES else name
    return found


def named(formula: str, language: str) -> str:
    """Return MathML in which every known symbol carries its name in the code."""
    known = pieces(language)
    pattern = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))

    def wrap(match: re.Match) -> str:
        return f'<mrow data-name="{known[match[0]]}">{match[0]}</mrow>'

    found = re.sub(pattern, wrap, formula)
    return found if well_formed(found) else formula
