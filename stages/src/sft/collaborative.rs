//! Stage `sft_collaborative`: samples that teach which items users take together, from the similar items of a
//! collaborative model.
//!
//! | | reference | fixed |
//! |---|---|---|
//! | which similar items | those of the first `top` that are known | the first `top` that are known and have a valid TID, without the anchor itself |
//! | anchors without a valid TID | kept | left out, counted |
//! | a missing title or description | an empty one | left out of the line |
//! | a description that is a list | as a Python literal | its parts, joined |
//! | square brackets inside words | kept | removed, as `sft_rec` does |

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    rec_text::{TID_LABEL, push_tid},
    samples::{ArrayWriter, EscapedTemplate, escaped, push_sample},
    shortened,
};
use crate::{
    Artifact, Compat, ParamIssue, Ports, Stage, StageContext, StageError,
    artifact::{Id2Meta, TidRecord, sequences, text},
    prompts::Prompts,
    stage::{Input, Output},
    threads,
};

pub struct SftCollaborative;

/// Parameters of `sft_collaborative`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// `reference` reproduces the published script's file byte for byte.
    pub compat: Compat,
    /// Similar items an anchor is taught with, at most.
    pub top: usize,
    /// Longest description in characters, the rest cut off; all of it if not set. Not with `compat: reference`.
    pub max_description: Option<usize>,
}

impl Default for Params {
    fn default() -> Self {
        Self { compat: Compat::Fixed, top: 5, max_description: None }
    }
}

impl Stage for SftCollaborative {
    const KIND: &'static str = "sft_collaborative";
    const SUMMARY: &'static str = "samples that teach which items users take together";
    type Params = Params;

    fn ports(_: &Params) -> Ports {
        Ports::new(
            [
                Input::required("id2meta", Artifact::Id2meta, "items with their TIDs"),
                Input::required("similar_items", Artifact::SimilarItems, "similar items, as `sasrec` writes them"),
                Input::optional("prompts", Artifact::Prompts, "prompt texts in place of the built-in ones"),
            ],
            [Output::new("sft", Artifact::Sft, "sft_collaborative.json", "one sample an anchor")],
        )
    }

    fn check(params: &Params) -> Vec<ParamIssue> {
        let mut issues = super::check_max_description(params.compat, params.max_description);
        if params.top == 0 {
            issues.push(ParamIssue::new("top", "at least one similar item is needed"));
        }
        issues
    }

    fn run(params: &Params, cx: &mut StageContext) -> Result<(), StageError> {
        let prompts = Prompts::load(cx.optional_input("prompts"))?;
        let (items, path) = (cx.input("id2meta")?, cx.input("similar_items")?);
        let pool = threads::pool(cx)?;
        let (id2meta, text) = pool.join(|| Id2Meta::read(items), || text::read(path));
        let (id2meta, text) = (id2meta?, text?);
        let usable: Vec<bool> = id2meta.records().iter().map(TidRecord::has_valid_tid).collect();
        let lines = pool.install(|| Lines::render(params, &id2meta));
        let instruction = escaped(&prompts.sft_collaborative.instruction);
        let input = EscapedTemplate::new(&prompts.sft_collaborative.input, &["item_line", "count"]);
        let mut writer = ArrayWriter::create(cx.output("sft")?)?;
        let (mut unknown, mut invalid, mut alone) = (0u64, 0u64, 0u64);
        let (mut similar, mut output) = (Vec::with_capacity(params.top), Vec::new());
        for line in sequences::similar_lines(&text) {
            let Some(anchor) = id2meta.place(line.head) else {
                unknown += 1;
                continue;
            };
            let known = |id| id2meta.place(id);
            similar.clear();
            match params.compat {
                Compat::Reference => similar.extend(line.items().take(params.top).filter_map(known)),
                Compat::Fixed if !usable[anchor] => {
                    invalid += 1;
                    continue;
                }
                Compat::Fixed => similar.extend(
                    (line.items().filter(|id| *id != line.head).filter_map(known))
                        .filter(|&i| usable[i])
                        .take(params.top),
                ),
            }
            if similar.is_empty() {
                alone += 1;
                continue;
            }
            output.clear();
            for (i, &item) in similar.iter().enumerate() {
                output.extend_from_slice(if i > 0 { br"\n\n" } else { b"" });
                output.extend_from_slice(format!("{}. ", i + 1).as_bytes());
                output.extend_from_slice(&lines.similar[item]);
            }
            let count = similar.len().to_string();
            let input = input.fill([&lines.anchor[anchor], count.as_bytes()]);
            writer.push(|out| push_sample(out, &instruction, input, [&*output]))?;
        }
        let samples = writer.finish()?;
        if samples == 0 {
            return Err(StageError::input(path, "no anchor is a known item with a known similar item")
                .help("the ids of `similar_items` and `id2meta` must come from one catalogue"));
        }
        for (count, why) in [
            (unknown, "they are not in the catalogue"),
            (invalid, "their TID is not five words"),
            (alone, "none of their similar items can be used"),
        ] {
            if count > 0 {
                cx.warn(format!("{count} anchors left out: {why}"));
            }
        }
        cx.info(format!("{samples} samples"));
        Ok(())
    }
}

/// Each item as it stands in a sample, by place in the catalogue, escaped.
struct Lines {
    anchor: Vec<Vec<u8>>,
    similar: Vec<Vec<u8>>,
}

impl Lines {
    fn render(params: &Params, id2meta: &Id2Meta) -> Self {
        let all = |push: fn(&mut String, &TidRecord, &Params)| -> Vec<Vec<u8>> {
            let mut text = String::new();
            let render = |record| {
                text.clear();
                push(&mut text, record, params);
                escaped(&text)
            };
            id2meta.records().iter().map(render).collect()
        };
        let (anchor, similar) = rayon::join(|| all(push_anchor), || all(push_similar));
        Self { anchor, similar }
    }
}

fn push_anchor(out: &mut String, record: &TidRecord, params: &Params) {
    out.push_str(TID_LABEL);
    out.push(' ');
    match params.compat {
        Compat::Reference => {
            push_tid(out, record.words());
            let [title, description] = ["title", "description"].map(|field| record.python_text(field, ""));
            for part in [" Title: ", &*title, ". Description: ", &*description, ". \n"] {
                out.push_str(part);
            }
        }
        Compat::Fixed => {
            push_tid(out, record.clean_words());
            push_title(out, record);
            if let Some(description) = record.description() {
                out.push_str(&format!(" Description: {}.", shortened(&description, params.max_description)));
            }
            out.push('\n');
        }
    }
}

fn push_similar(out: &mut String, record: &TidRecord, params: &Params) {
    out.push_str(TID_LABEL);
    out.push(' ');
    match params.compat {
        Compat::Reference => {
            push_tid(out, record.words());
            for part in [" Title: ", &*record.python_text("title", ""), "."] {
                out.push_str(part);
            }
        }
        Compat::Fixed => {
            push_tid(out, record.clean_words());
            push_title(out, record);
        }
    }
    out.push('\n');
}

fn push_title(out: &mut String, record: &TidRecord) {
    if let Some(title) = record.title() {
        out.push_str(&format!(" Title: {title}."));
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{Bench, shared_data};
    use serde_json::json;

    #[test]
    fn fixed_fills_up_with_the_next_usable_items() {
        let id2meta = r#"{
            "1": {"id": "1", "title": "A", "description": "abcdef", "summary_words": ["a", "b", "c", "d", "[e]"]},
            "2": {"id": "2", "title": "B", "summary_words": ["a", "b", "c", "d", "2"]},
            "3": {"id": "3", "summary_words": ["a", "b", "c", "d", "3"]},
            "4": {"id": "4", "title": "D", "summary_words": []}
        }"#;
        let ran = Bench::new()
            .input("id2meta", id2meta)
            .input("similar_items", "anchor top1 top2\n1 99 1 4 2 3\n4 1\n9 1\n2 4\n")
            .run("sft_collaborative", json!({"top": 2, "max_description": 3}))
            .unwrap();
        let samples = ran.json("sft");
        assert_eq!(samples.as_array().unwrap().len(), 1);
        assert_eq!(samples[0]["input"], "Item text ID: [a, b, c, d, e] Title: A. Description: abc....\n\nList 2:");
        assert_eq!(
            samples[0]["output"],
            "1. Item text ID: [a, b, c, d, 2] Title: B.\n\n\n2. Item text ID: [a, b, c, d, 3]\n"
        );
        assert_eq!(
            ran.logs(),
            [
                "1 anchors left out: they are not in the catalogue",
                "1 anchors left out: their TID is not five words",
                "1 anchors left out: none of their similar items can be used",
                "1 samples"
            ]
        );
    }

    #[test]
    fn the_published_file_comes_out_byte_for_byte() {
        let Some(data) = shared_data() else { return };
        let quirks = data.join("golden/quirks");
        let ran = Bench::new()
            .input_path("id2meta", quirks.join("expected/id2meta.json"))
            .input_path("similar_items", quirks.join("similar_item_sasrec_num.txt"))
            .input_path("prompts", data.join("data/reference_prompts.json"))
            .run("sft_collaborative", json!({"compat": "reference"}))
            .unwrap();
        assert!(ran.text("sft") == std::fs::read_to_string(quirks.join("expected/sft_collaborative.json")).unwrap());
    }

    #[test]
    fn foreign_ids_are_an_error() {
        let error = Bench::new()
            .input("id2meta", r#"{"1": {"id": "1", "summary_words": ["a", "b", "c", "d", "e"]}}"#)
            .input("similar_items", "anchor top1\nx y\n")
            .run("sft_collaborative", json!({}))
            .err()
            .unwrap();
        assert!(error.to_string().contains("no anchor is a known item"), "{error}");
    }
}
