"""Where pairs of sentences come from, in files of the real formats, and what is refused."""

import re
import struct

import pytest

from distill_lightning import GettextCatalogues, InputError, LibreOfficeHelp, ParallelText
from distill_lightning.data.datamodules.translation import Faults, catalogues, libreoffice


def read(corpus, folder, *, source="en", target="de", on_damaged="error"):
    faults = Faults(on_damaged)
    splits = corpus.read(folder, source=source, target=target, faults=faults)
    return {split: [(pair.source, pair.target) for pair in pairs] for split, pairs in splits.items()}, faults


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


# Parallel text


@pytest.mark.parametrize(
    ("val", "test", "given"),
    [
        ("val", "test_2016_flickr", {}),
        ("valid", "test", {}),
        ("dev", "tst", {}),
        ("newstest2013", "newstest2014", {"val": "newstest2013", "test": ["newstest2014"]}),
    ],
)
def test_lines_are_pairs(tmp_path, val, test, given):
    # U+2028 and U+0085 are no line's end, a carriage return before one is part of it; the last end may be missing.
    write(tmp_path, {"train.en": "One.\r\n Two\u2028too.\n\n", "train.de": "Eins.\nZwei\u0085auch.\n\n"})
    write(tmp_path, {f"{val}.en": "Three", f"{val}.de": "Drei", f"{test}.en": "Four\n", f"{test}.de": "Vier\n"})
    found, faults = read(ParallelText(**given), tmp_path)
    assert found == {
        "train": [("One.", "Eins."), ("Two\u2028too.", "Zwei\u0085auch.")],
        "val": [("Three", "Drei")],
        "test": [("Four", "Vier")],
    }
    assert not faults.counts
    back, _ = read(ParallelText(**given), tmp_path, source="de", target="en")
    assert back["test"] == [("Vier", "Four")]


def test_several_names_make_one_split(tmp_path):
    write(tmp_path, {f"{name}.{language}": f"{name} {language}" for name in ("a", "b") for language in ("en", "de")})
    assert read(ParallelText(train=["b", "a"]), tmp_path)[0] == {"train": [("b en", "b de"), ("a en", "a de")]}


@pytest.mark.parametrize("names", [{"train": []}, {"val": []}, {"test": ""}])
def test_names_of_no_files_are_refused(names):
    ((split, given),) = names.items()
    with pytest.raises(InputError, match=re.escape(f"ParallelText: {split}={given!r} names no file: give names, or")):
        ParallelText(**names)


TAGS = """<doc docid="1" genre="lectures">
<url>http://www.ted.com/talks/1</url>
<keywords>talks, {0}</keywords>
<speaker>Some One</speaker>
<talkid>1</talkid>
<title>{0}: A title</title>
<description>TED Talk: {0}</description>
 The {0} words.
 <i>Italics</i> & more in {0}.
<reviewer></reviewer>
<translator>Another One</translator>
</doc>
"""
SEGMENTS = """<?xml version="1.0" encoding="UTF-8"?>
<mteval>
<srcset setid="iwslt2015-{1}" srclang="english">
<doc docid="1" genre="lectures">
<talkid>1</talkid>
<title>A title</title>
<seg id="1"> {0} &amp; {1} </seg>
<seg id="2"> &lt;{0}&gt; </seg>
</doc>
</srcset>
</mteval>
"""


@pytest.mark.parametrize("called", ["en-de", "de-en"])
def test_iwslts_files(tmp_path, called):
    for language in ("en", "de"):
        write(tmp_path, {f"train.tags.{called}.{language}": TAGS.format(language)})
        for name in ("dev2010", "tst2010", "tst2013"):
            write(tmp_path, {f"IWSLT15.TED.{name}.{called}.{language}.xml": SEGMENTS.format(language, name)})
    found, _ = read(ParallelText(), tmp_path)
    assert found["train"] == [
        ("The en words.", "The de words."),
        ("<i>Italics</i> & more in en.", "<i>Italics</i> & more in de."),
    ]
    assert found["val"] == [("en & dev2010", "de & dev2010"), ("<en>", "<de>")]
    assert [source for source, _ in found["test"]] == ["en & tst2010", "<en>", "en & tst2013", "<en>"]
    only, _ = read(ParallelText(test="tst2013"), tmp_path)
    assert only["test"] == [("en & tst2013", "de & tst2013"), ("<en>", "<de>")]


def test_a_sentence_is_the_same_in_iwslts_two_kinds_of_files(tmp_path):
    for language in ("en", "de"):
        write(tmp_path, {f"train.tags.en-de.{language}": "<url>x</url>\n Rock &amp;  roll, &#39;&lt;{}&gt;&quot;.\n"})
        segment = '<seg id="1"> Rock &amp; roll, &#39;&lt;{}&gt;&quot;. </seg>\n'
        write(tmp_path, {f"I.TED.tst1.en-de.{language}.xml": segment})
    found, _ = read(ParallelText(), tmp_path)
    assert found["train"] == found["test"] == [("Rock & roll, '<{}>\".",) * 2]


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"train.en": "a\nb\n", "train.de": "x\n"}, r"train\.en:2 has no partner: train\.de has 1 sentences"),
        ({"train.en": "a\nb\n", "train.de": "x\n\n"}, r"train\.en:2: the target is empty: mend it, or"),
        ({"train.en": "a\n \nc", "train.de": "x\ny\nz"}, r"train\.en:2: the source is empty"),
        ({"train.en": b"a\nb \xff\n", "train.de": "x\ny\n"}, r"train\.en:2 is not UTF-8 \(byte 3 of the line\)"),
        ({"train.en": "a\n"}, r"has no train\.en and train\.de: .*there are train\.en"),
        ({"train.en": "a", "train.de": "x", "dev.en": "b"}, r"dev\.en has no partner dev\.de: add it, or take"),
        ({"train.en": "a", "train.de": "x", "tst.de": "y"}, r"tst\.de has no partner tst\.en: .* for test are drawn"),
        ({"text.en": "a\n", "text.de": "x\n"}, r"give the name of the files as train of ParallelText; there are text"),
        (
            {"train.tags.en-de.en": TAGS, "train.tags.en-de.de": TAGS.replace(" The {0} words.\n", "")},
            r"train\.tags\.en-de\.en:9 has no partner",
        ),
        (
            {"train.en": "a", "train.de": "x", "I.TED.dev1.en-de.en.xml": SEGMENTS}
            | {"I.TED.dev1.en-de.de.xml": SEGMENTS.replace('id="2"', 'id="3"')},
            r"dev1\.en-de\.en\.xml:8 is segment 2, and .*de\.xml:8 is segment 3",
        ),
        (
            {"train.en": "a", "train.de": "x", "I.TED.dev1.en-de.en.xml": SEGMENTS}
            | {"I.TED.dev1.en-de.de.xml": SEGMENTS.replace('<seg id="2"> &lt;{0}&gt; </seg>\n', "")},
            r"en\.xml:8: the segment has no partner",
        ),
        (
            {"train.en": "a", "train.de": "x", "I.TED.dev1.en-de.en.xml": SEGMENTS.replace("</seg>", "", 1)}
            | {"I.TED.dev1.en-de.de.xml": SEGMENTS},
            r"en\.xml:7 is no <seg",
        ),
    ],
)
def test_what_is_wrong_with_text_is_told_with_file_and_line(tmp_path, files, line):
    write(tmp_path, files)
    with pytest.raises(InputError, match=line):
        read(ParallelText(), tmp_path)


@pytest.mark.parametrize("folder", ["", "none"])
def test_where_there_is_no_text_it_is_told_where_to_get_some(tmp_path, folder):
    with pytest.raises(InputError, match=r"Multi30k is at https://\S+, IWSLT's talks are at https://\S+$") as refused:
        read(ParallelText(), tmp_path / folder)
    assert "\n" not in str(refused.value)


def test_damaged_lines_can_be_left_out(tmp_path):
    write(tmp_path, {"train.en": b"a\n\xff\nc\nd\n\n", "train.de": b"x\ny\n\nz\n\n"})
    found, faults = read(ParallelText(), tmp_path, on_damaged="skip")
    assert found == {"train": [("a", "x"), ("d", "z")]}
    assert faults.counts == {"lines that are not UTF-8": 1, "pairs with an empty side": 1}
    assert re.search(r"1 pairs with an empty side \(the first: .*train\.en:3: the target is empty\)", faults.told())


# LibreOffice's help


def page(language, body):
    return f'<!DOCTYPE html>\n<html lang="{language}"><head><title>x</title></head>\n<body>\n{body}\n</body></html>\n'


ENGLISH = """<h1 id="hd_id1" dir="auto">
<a name="x"></a>Inserting &amp; editing</h1>
<p id="par_id2" class="paragraph" dir="auto">Press <span id="s_1" class="switchinline"><span hidden="true" id="MACs_1"
class="MAC"><span class="keycode">Command</span></span><span hidden="true" id="defaults_1">Ctrl</span></span>+F.</p>
<p id="par_id2" class="embedded" dir="auto">Again.</p>
<p id="par_id3" dir="auto">oDoc.close(True)</p>
<p id="par_id4" dir="auto"><img src="a.svg" alt="Icon"></p>
<p id="par_id5" dir="auto">Only here.</p>
<p dir="auto">No id.</p>"""
GERMAN = """<h1 id="hd_id1" dir="auto">Einf&uuml;gen
  &amp; bearbeiten</h1>
<p id="par_id2" class="paragraph" dir="auto">Drücken Sie <span id="s_1" class="switchinline"><span hidden="true"
id="defaults_1">Strg</span><span hidden="true" id="MACs_1" class="MAC"><span class="keycode">Befehl</span></span></span>
+F.</p>
<p id="par_id2" class="embedded" dir="auto">Nochmals.</p>
<p id="par_id3" dir="auto">oDoc.close(True)</p>
<p id="par_id4" dir="auto"><img src="a.svg" alt="Symbol"></p>
<p id="par_id6" dir="auto">Nur hier.</p>"""


def test_help_pages_are_paired_by_ids(tmp_path):
    write(tmp_path, {"en-US/text/a/1.html": page("en-US", ENGLISH), "de/text/a/1.html": page("de", GERMAN)})
    write(tmp_path, {"en-US/text/b.html": page("en-US", '<p id="par_id1">Untranslated page</p>')})
    found, _ = read(LibreOfficeHelp(), tmp_path)
    assert found == {
        "train": [
            ("Inserting & editing", "Einfügen & bearbeiten"),
            ("Press Ctrl+F.", "Drücken Sie Strg +F."),
            ("Again.", "Nochmals."),
        ]
    }
    assert libreoffice.read_help(tmp_path, "en", "de").pairs[1].where == f"{tmp_path}/en-US/text/a/1.html:6"


@pytest.mark.parametrize("damaged", [False, True])
def test_what_is_wrong_with_the_help_is_told(tmp_path, damaged):
    write(tmp_path, {"en-US/1.html": page("en-US", ENGLISH)})
    if damaged:
        write(tmp_path, {"de/1.html": b"<html>\n\xff</html>"})
    line = r"de/1\.html:2 is not UTF-8" if damaged else r"de is not there: apt-get install libreoffice-help-de, or give"
    with pytest.raises(InputError, match=line):
        read(LibreOfficeHelp(), tmp_path)


def test_damaged_pages_of_the_help_can_be_left_out(tmp_path):
    for name, german in (("1", page("de", '<p id="par_id1">Eins</p>')), ("2", b"\xff"), ("3", b"\n\n\xff")):
        english = page("en-US", '<p id="par_id1">One</p>')
        write(tmp_path, {f"en-US/{name}.html": english, f"de/{name}.html": german})
    found, faults = read(LibreOfficeHelp(), tmp_path, on_damaged="skip")
    assert found == {"train": [("One", "Eins")]}
    assert faults.told() == f"2 pages that are not UTF-8 (the first: {tmp_path}/de/2.html:1 is not UTF-8)"
    # What is kept of the first reading is refused all the same.
    with pytest.raises(InputError, match=r"de/2\.html:1 is not UTF-8: mend it, or give on_damaged: skip"):
        read(LibreOfficeHelp(), tmp_path)


@pytest.mark.parametrize("between", ["<br>", "<br/>", '<BR class="x" />', " <br>\n"])
def test_a_break_parts_two_words(tmp_path, between):
    for language in ("en-US", "de"):
        text = f'<p id="par_id1">{language} tool<b>bar</b>{between}and</p>'
        write(tmp_path, {f"{language}/1.html": page(language, text)})
    assert read(LibreOfficeHelp(), tmp_path)[0] == {"train": [("en-US toolbar and", "de toolbar and")]}


@pytest.mark.slow
def test_the_systems_own_help():
    if not all((libreoffice.HELP_FOLDER / language).is_dir() for language in ("en-US", "de")):
        pytest.skip("libreoffice-help-en-us and libreoffice-help-de are not installed")
    pairs = set(read(LibreOfficeHelp(), None)[0]["train"])
    assert len(pairs) > 25_000
    assert not [pair for pair in pairs if any("<span" in side or "  " in side or "\n" in side for side in pair)]


# gettext's catalogues

HEADER = "Project-Id-Version: x\nContent-Type: text/plain; charset={}\nPlural-Forms: nplurals=2; plural=n != 1;\n"
MESSAGES = {
    "": HEADER,
    "File": "Datei",
    "menu\4File": "Akte",
    "%d file\0%d files": "%d Datei\0%d Dateien",
    "Two\nlines  here\n": "Zwei\nZeilen für\talle\n",
    "untranslated": "",
    "OK": "OK",
}
PAIRS = [
    ("File", "Datei"),
    ("File", "Akte"),
    ("%d file", "%d Datei"),
    ("%d files", "%d Dateien"),
    ("Two lines here", "Zwei Zeilen für alle"),
]


def binary(messages, *, charset="UTF-8", order="<"):
    """A catalogue as msgfmt writes it."""
    pairs = [(key.encode(charset), text.format(charset).encode(charset)) for key, text in sorted(messages.items())]
    count = len(pairs)
    at, tables, strings = 28 + 16 * count, [], b""
    for side in (0, 1):
        for pair in pairs:
            tables.append(struct.pack(f"{order}2I", len(pair[side]), at + len(strings)))
            strings += pair[side] + b"\0"
    head = struct.pack(f"{order}7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 28 + 16 * count)
    return head + b"".join(tables) + strings


PO = r"""# A translator's comment
msgid ""
msgstr ""
"Content-Type: text/plain; charset=UTF-8\n"
"Plural-Forms: nplurals=2; plural=n != 1;\n"

#: main.c:3
msgid "File"
msgstr "Datei"

msgctxt "menu"
msgid "File"
msgstr "Akte"
#, c-format
msgid "%d file"
msgid_plural "%d files"
msgstr[0] "%d Datei"
msgstr[1] "%d Dateien"

msgid ""
"Two\n"
"lines  here\n"
msgstr ""
"Zwei\nZeilen "
"für\talle\n"

#, fuzzy
msgid "Edit"

msgstr "Ansicht"

msgid "untranslated"
msgstr ""

msgid "OK"
msgstr "OK"

msgid "a \"quoted\" \\n"
msgstr "ein \"zitiertes\" \\n"

#~ msgid "Old"
#~ msgstr "Alt"
"""


@pytest.mark.parametrize(("charset", "order"), [("UTF-8", "<"), ("ISO-8859-1", ">")])
def test_binary_catalogues(tmp_path, charset, order):
    write(tmp_path, {"de/LC_MESSAGES/x.mo": binary(MESSAGES, charset=charset, order=order)})
    assert sorted(read(GettextCatalogues(), tmp_path)[0]["train"]) == sorted(PAIRS)
    back, _ = read(GettextCatalogues(), tmp_path, source="de", target="en")
    assert sorted(back["train"]) == sorted((target, source) for source, target in PAIRS)


@pytest.mark.parametrize("name", ["de/LC_MESSAGES/x.po", "program/po/de.po"])
def test_text_catalogues(tmp_path, name):
    write(tmp_path, {name: PO})
    found, _ = read(GettextCatalogues(), tmp_path)
    assert found == {"train": [*PAIRS, ('a "quoted" \\n', 'ein "zitiertes" \\n')]}


@pytest.mark.parametrize(
    ("before", "message", "expected"),
    [
        # The flag is the obsolete entry's.
        ('#, fuzzy\n#~ msgid "old"\n#~ msgstr "alt"\n\n', "neu", "neu"),
        ('#, fuzzy\n#~ msgid "old"\n#~ msgstr "alt"\n', "neu", "neu"),
        ('#, fuzzy\n#~| msgid "older"\n#~ msgid "old"\n#~ msgstr "alt"\n\n#, fuzzy\n', "neu", None),
        ("", r"\x5bn\145u\033\x5d\\033", "[neu\033]\\033"),
        ("", r"l\303\244uft \xc3\xbcber", "läuft über"),
    ],
)
@pytest.mark.parametrize("head", ["", "\ufeff", 'msgid ""\nmsgstr "Content-Type: text/plain; charset=CHARSET\\n"\n\n'])
def test_text_catalogues_are_read_as_gettext_reads_them(tmp_path, head, before, message, expected):
    write(tmp_path, {"de.po": f'{head}{before}msgid "new"\nmsgstr "{message}"\n'})
    forms = [found.forms for found in catalogues.read_po(tmp_path / "de.po") if found.ids == ("new",)]
    assert forms == ([] if expected is None else [(expected,)])


@pytest.mark.parametrize(
    ("forms", "expected"),
    [
        ("%d个", [("%d files", "%d个")]),
        ("%d plik\0%d pliki\0%d plików", [("%d file", "%d plik"), ("%d files", "%d plików")]),
    ],
)
def test_languages_with_other_plurals(tmp_path, forms, expected):
    write(tmp_path, {"xx/LC_MESSAGES/x.mo": binary({"": HEADER, "%d file\0%d files": forms})})
    assert read(GettextCatalogues(), tmp_path, target="xx")[0] == {"train": expected}


def test_two_languages_meet_in_the_english_message(tmp_path):
    write(tmp_path, {"de/LC_MESSAGES/x.mo": binary(MESSAGES)})
    write(tmp_path, {"fr/LC_MESSAGES/x.mo": binary({"": HEADER, "menu\4File": "Fichier", "Edit": "Édition"})})
    write(tmp_path, {"fr/LC_MESSAGES/y.mo": binary({"": HEADER, "File": "Fichiers"})})
    assert read(GettextCatalogues(), tmp_path, source="fr")[0] == {"train": [("Fichier", "Akte")]}


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("x.mo", b"\xde\x12\x04", r"x\.mo is no gettext catalogue"),
        ("x.mo", binary(MESSAGES)[:60], r"x\.mo is damaged: it has 60 bytes, too few for 7 messages"),
        ("x.mo", binary(MESSAGES)[:-40], r"x\.mo is damaged \(a message ends at byte"),
        ("x.mo", binary({"": HEADER, "a": "ä"}).replace(b"UTF-8", b"ascii"), r"x\.mo is damaged \('ascii' codec"),
        ("x.po", PO.replace('msgstr "Akte"', "msgstr Akte"), r"x\.po:13 is no line of a catalogue: 'msgstr Akte'"),
        ("x.po", PO[: PO.index('msgstr "Akte"')], r"x\.po:11 begins an entry without msgstr"),
        ("x.po", PO.replace("Akte", r"Akte \344"), r"x\.po:13: an escape is not in the character set UTF-8"),
        ("x.po", PO.encode("latin-1"), r"x\.po:25 is not in the character set UTF-8"),
    ],
)
def test_damaged_catalogues(tmp_path, name, content, line):
    write(tmp_path, {f"de/LC_MESSAGES/{name}": content, "de/LC_MESSAGES/y.mo": binary({"": HEADER, "Yes": "Ja"})})
    with pytest.raises(InputError, match=line):
        read(GettextCatalogues(), tmp_path)
    found, faults = read(GettextCatalogues(), tmp_path, on_damaged="skip")
    assert found == {"train": [("Yes", "Ja")]}
    assert faults.counts == {"damaged catalogues": 1}


@pytest.mark.parametrize("languages", [("en", "de"), ("de", "en"), ("fr", "de")])
def test_catalogues_in_which_nothing_is_translated_have_no_pairs(tmp_path, languages):
    write(tmp_path, {f"{one}/LC_MESSAGES/x.mo": binary({"": HEADER, "File": ""}) for one in ("de", "fr")})
    source, target = languages
    assert read(GettextCatalogues(), tmp_path, source=source, target=target)[0] == {"train": []}


def test_a_language_without_catalogues(tmp_path):
    write(tmp_path, {"de/LC_MESSAGES/x.mo": binary(MESSAGES)})
    with pytest.raises(InputError, match=r"has no catalogues of 'fr' .*it has de; install translated programs"):
        read(GettextCatalogues(), tmp_path, target="fr")


@pytest.mark.slow
def test_the_systems_own_catalogues():
    if not any((catalogues.LOCALE_FOLDER / "de/LC_MESSAGES").glob("*.mo")):
        pytest.skip("no German catalogues are installed")
    found, _ = read(GettextCatalogues(), None)
    assert len(found["train"]) > 100
    assert all(source and target and source != target for source, target in found["train"])
