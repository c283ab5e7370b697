//! From the text of a file to what is said of it, across the steps of loading.

use std::fs;

use super::{Pipeline, PipelineErrors, PipelineFile, Selection, load};

/// Loads a text as a pipeline file.
fn loaded(text: &str) -> Result<Pipeline, PipelineErrors> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("p.yaml");
    fs::write(&file, text).unwrap();
    load(&file, &Selection::default())
}

/// What is wrong with a text: `LINE:COLUMN message (help)`, a line each.
fn wrong(text: &str) -> String {
    loaded(text).map(|p| p.name).map_err(|errors| lines(&errors)).unwrap_err()
}

fn lines(errors: &PipelineErrors) -> String {
    let line = |e: &super::PipelineError| {
        let place = e.place.as_ref().map_or_else(|| "-".to_owned(), |p| format!("{}:{}", p.line, p.column));
        format!("{place} {} ({})", e.message, e.help.as_deref().unwrap_or("-"))
    };
    errors.errors.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn assert_says(said: &str, wanted: &[&str]) {
    for text in wanted {
        assert!(said.contains(text), "`{text}` is missing from:\n{said}");
    }
}

/// A `command` with more keys.
fn command(keys: &str) -> String {
    format!("stages:\n  s: {{ uses: command, with: {{ run: 'true > ${{outputs.o}}' }}, outputs: {{ o: o }}{keys} }}\n")
}

#[test]
fn retries_that_are_not_given_differ_from_none() {
    for (keys, wanted) in [("", None), (", retries: 0", Some(0)), (", retries: 2", Some(2))] {
        assert_eq!(loaded(&command(keys)).unwrap().stages[0].retries, wanted, "{keys}");
    }
}

#[test]
fn empty_files_are_called_empty_and_empty_blocks_are_none() {
    for text in ["", "# nothing\n", "---\n", "~\n"] {
        assert_says(&wrong(text), &["is empty", "`name` and `stages`"]);
    }
    assert!(loaded(&format!("vars:\nvariants:\n{}", command(""))).is_ok());
}

#[test]
fn mistakes_of_indentation_and_brackets_say_where_to_look() {
    let said = wrong("stages:\n  s:\n    uses: synth\n     with: { items: 3 }\n");
    assert_says(&said, &["4:", "indented", "needs quotes"]);
    let said = wrong("stages:\n  s:\n    uses: synth\n    with: { items: 3\n    retries: 1\n  t: { uses: synth }\n");
    assert_says(&said, &["`{` of line 4, column 11 closed"]);
    assert_says(&wrong("name: 'x\nstages: {}\n"), &["quote of line 1, column 7 closed"]);
    assert_says(&wrong("stages:\n  - uses: synth\n"), &["2:3 expected a map", "as a key, without `-`"]);
}

#[test]
fn a_wrong_key_with_a_wrong_value_is_named_too() {
    let said = wrong("stages:\n  s: { uses: command, with: { rn: 'x ${outputs.o}' }, outputs: { o: o } }\n");
    assert_says(&said, &["unknown key `rn` (did you mean `run`?)", "`run` is missing", "no meaning here"]);
}

#[test]
fn missing_files_are_told_along_with_other_mistakes() {
    let said = wrong(&command(", code: [nowhere.py], inputs: { a: { file: gone.txt }, b: nope }"));
    assert_says(&said, &["`nowhere.py` does not exist", "`gone.txt` does not exist", "unknown stage `nope`"]);
    let said = wrong(&command(", inputs: { a: { file: '${vars.gone}' } }"));
    assert!(!said.contains("does not exist"), "{said}");
}

#[test]
fn a_variable_is_either_recorded_or_kept() {
    assert_says(&wrong(&command(", env: [A, TOK], secrets: [TOK]")), &["`TOK` is in `env` and in `secrets`"]);
    assert_says(&wrong(&command(", env: [TOK], pass_env: [TOK]")), &["`TOK` is in `env` and in `pass_env`"]);
    assert!(loaded(&command(", env: [A], pass_env: [TOK], secrets: [TOK]")).is_ok());
}

#[test]
fn a_server_s_key_that_the_stage_would_not_see_is_a_mistake() {
    let stage = |declared: &str| {
        let model = "{ endpoint: 'http://h/v1', model: m, api_key_env: KEY }";
        format!(
            "stages:\n  i: {{ uses: synth }}\n  s:\n    uses: similarity\n    inputs: {{ items: i.items }}\n    \
             with: {{ encoder: {model} }}\n{declared}"
        )
    };
    for declared in ["", "    env: [KEY]\n", "    secrets: [KEI]\n"] {
        assert_says(&wrong(&stage(declared)), &["6:", "`KEY` is not passed on", "secrets: [KEY]"]);
    }
    assert!(loaded(&stage("    secrets: [KEY]\n")).is_ok());
    assert!(loaded(&stage("    pass_env: [KEY]\n")).is_ok());
}

#[test]
fn a_check_of_two_parameters_names_both_once() {
    let text = "stages:\n  s:\n    uses: train\n    with: { architecture: { heads: 3, kv_heads: 2 } }\n";
    let said = wrong(text);
    assert_eq!(said.matches("must divide").count(), 1, "{said}");
    assert_says(&said, &["`kv_heads` (2) must divide `heads` (3)"]);
}

#[test]
fn the_nearest_file_of_the_folder_is_named() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("quickstart.yaml"), "").unwrap();
    let error = load(&folder.path().join("quickstrat.yaml"), &Selection::default()).unwrap_err();
    assert_says(&lines(&error), &["cannot read", "did you mean", "quickstart.yaml`?"]);
}

#[test]
fn every_wrong_variant_is_told_and_common_mistakes_once() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("p.yaml");
    let variants = "variants:\n  a: { set: { s.with.items: many } }\n  b: { set: { t: 1 } }\n  c: {}\n";
    fs::write(&file, format!("stages:\n  s: {{ uses: synth, with: {{ sede: 1 }} }}\n{variants}")).unwrap();
    let error = PipelineFile::read(&file).unwrap().load_all(&[], &[]).unwrap_err();
    insta::assert_snapshot!(lines(&error), @r"
    2:29 unknown key `sede` (did you mean `seed`?)
    4:29 in variant `a`: expected a whole number that is not negative, found `many` (-)
    5:15 in variant `b`: there is no stage `t` (did you mean `s`?)
    ");
    let error = PipelineFile::read(&file).unwrap().load_all(&["x".into(), "y".into()], &[]).unwrap_err();
    assert_says(&lines(&error), &["no variant `x`", "no variant `y`"]);
}

/// Each cell reads nothing again and expands no matrix: time grows with their number.
#[test]
fn thousands_of_cells_load() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("p.yaml");
    let values: Vec<String> = (1..=10_000).map(|n| n.to_string()).collect();
    let variants = format!("variants: {{ m: {{ matrix: {{ s.retries: [{}] }} }} }}\n", values.join(","));
    fs::write(&file, command("") + &variants).unwrap();
    // Reading the file once for each cell would never end.
    let all = PipelineFile::read(&file).unwrap().load_all(&[], &[]).unwrap();
    assert_eq!((all.len(), all[10_000].stages[0].retries), (10_001, Some(10_000)));
}
