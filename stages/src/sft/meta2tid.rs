//! Stage `sft_meta2tid`: samples that teach a model each item's TID from its title and description.
//!
//! | | reference | fixed |
//! |---|---|---|
//! | items whose TID is not five non-blank words | are targets too | left out, counted |
//! | items with neither title nor description | a prompt about nothing | left out, counted |
//! | a missing title or description | an empty line | no line |
//! | a description that is a list | as a Python literal | its parts, joined |
//! | square brackets inside words | kept | removed, as `sft_rec` does |

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    rec_text::push_tid,
    samples::{ArrayWriter, EscapedTemplate, escaped, push_sample},
    shortened,
};
use crate::{
    Artifact, Compat, Ports, Stage, StageContext, StageError,
    artifact::{Id2Meta, TidRecord},
    prompts::{self, Prompts},
    stage::{Input, Output},
};

pub struct SftMeta2Tid;

/// Parameters of `sft_meta2tid`.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// `reference` reproduces the published script's file byte for byte.
    pub compat: Compat,
    /// Longest description in characters, the rest cut off; all of it if not set. Not with `compat: reference`.
    pub max_description: Option<usize>,
}

impl Stage for SftMeta2Tid {
    const KIND: &'static str = "sft_meta2tid";
    const SUMMARY: &'static str = "samples that teach each item's TID from its title and description";
    type Params = Params;

    fn ports(_: &Params) -> Ports {
        Ports::new(
            [
                Input::required("id2meta", Artifact::Id2meta, "items with their TIDs"),
                Input::optional("prompts", Artifact::Prompts, "prompt texts in place of the built-in ones"),
            ],
            [Output::new("sft", Artifact::Sft, "sft_meta2tid.json", "one sample an item")],
        )
    }

    fn check(params: &Params) -> Vec<crate::ParamIssue> {
        super::check_max_description(params.compat, params.max_description)
    }

    fn run(params: &Params, cx: &mut StageContext) -> Result<(), StageError> {
        let prompts = Prompts::load(cx.optional_input("prompts"))?;
        let path = cx.input("id2meta")?;
        let id2meta = Id2Meta::read(path)?;
        let instruction = escaped(&prompts.sft_meta2tid.instruction);
        let template = EscapedTemplate::new(&prompts.sft_meta2tid.input, &["title_line", "description_line"]);
        let mut writer = ArrayWriter::create(cx.output("sft")?)?;
        let (mut invalid, mut silent) = (0u64, 0u64);
        let mut tid = String::new();
        for record in id2meta.records() {
            tid.clear();
            match params.compat {
                Compat::Reference => {
                    push_tid(&mut tid, record.words());
                    let lines = [
                        reference_line(record, "Title", "title"),
                        reference_line(record, "Description", "description"),
                    ];
                    let input = template.fill(lines.each_ref().map(Vec::as_slice));
                    writer.push(|out| push_sample(out, &instruction, input, [&*escaped(&tid)]))?;
                }
                Compat::Fixed if !record.has_valid_tid() => invalid += 1,
                Compat::Fixed => match fixed_input(record, &prompts, params.max_description) {
                    Some(input) => {
                        push_tid(&mut tid, record.clean_words());
                        writer.push(|out| push_sample(out, &instruction, [&*escaped(&input)], [&*escaped(&tid)]))?;
                    }
                    None => silent += 1,
                },
            }
        }
        let samples = writer.finish()?;
        if samples == 0 {
            return Err(StageError::input(path, "no item has both a valid TID and a title or description")
                .help("give the catalogue titles, or leave this stage out of the training data"));
        }
        if invalid > 0 {
            cx.warn(format!("{invalid} items left out: their TID is not five words"));
        }
        if silent > 0 {
            cx.warn(format!("{silent} items left out: they have neither title nor description"));
        }
        cx.info(format!("{samples} samples"));
        Ok(())
    }
}

fn reference_line(record: &TidRecord, label: &str, field: &str) -> Vec<u8> {
    record.python_truthy(field).map_or_else(Vec::new, |value| escaped(&format!("{label}: {value}")))
}

/// `None` if there is nothing to name the item by.
fn fixed_input(record: &TidRecord, prompts: &Prompts, max_description: Option<usize>) -> Option<String> {
    let title = record.title().map(|t| format!("Title: {t}")).unwrap_or_default();
    let description =
        record.description().map(|d| format!("Description: {}", shortened(&d, max_description))).unwrap_or_default();
    if title.is_empty() && description.is_empty() {
        return None;
    }
    let values = [("title_line", &*title), ("description_line", &*description)];
    Some(prompts::render_without_empty_lines(&prompts.sft_meta2tid.input, &values))
}

#[cfg(test)]
mod tests {
    use crate::testing::{Bench, shared_data};
    use serde_json::json;

    const ID2META: &str = r#"{
        "1": {"id": "1", "title": "Bar", "description": ["a", "b"], "summary_words": ["[a]", "b", "c", "d", "e"]},
        "2": {"id": "2", "title": "Blank", "summary_words": ["a", "", "c", "d", "e"]},
        "3": {"id": "3", "title": "", "summary_words": ["a", "b", "c", "d", "e"]},
        "4": {"id": "4", "description": "0123456789", "summary_words": ["a", "b", "c", "d", "f"]}
    }"#;

    #[test]
    fn fixed_leaves_out_what_teaches_nothing() {
        let ran = Bench::new().input("id2meta", ID2META).run("sft_meta2tid", json!({"max_description": 4})).unwrap();
        let samples = ran.json("sft");
        let pairs: Vec<_> = samples
            .as_array()
            .unwrap()
            .iter()
            .map(|s| (s["input"].as_str().unwrap(), s["output"].as_str().unwrap()))
            .collect();
        assert_eq!(
            pairs,
            [("Title: Bar\nDescription: a b", "[a, b, c, d, e]"), ("Description: 0123...", "[a, b, c, d, f]")]
        );
        assert_eq!(
            ran.logs(),
            [
                "1 items left out: their TID is not five words",
                "1 items left out: they have neither title nor description",
                "2 samples"
            ]
        );
    }

    #[test]
    fn reference_keeps_everything() {
        let ran = Bench::new().input("id2meta", ID2META).run("sft_meta2tid", json!({"compat": "reference"})).unwrap();
        let samples = ran.json("sft");
        assert_eq!(samples[0]["input"], "Title: Bar\nDescription: ['a', 'b']");
        assert_eq!(samples[0]["output"], "[[a], b, c, d, e]");
        assert_eq!(samples[1]["output"], "[a, , c, d, e]");
        assert_eq!(samples[2]["input"], "\n");
    }

    #[test]
    fn the_published_file_comes_out_byte_for_byte() {
        let Some(data) = shared_data() else { return };
        let expected = data.join("golden/quirks/expected");
        let ran = Bench::new()
            .input_path("id2meta", expected.join("id2meta.json"))
            .input_path("prompts", data.join("data/reference_prompts.json"))
            .run("sft_meta2tid", json!({"compat": "reference"}))
            .unwrap();
        assert!(ran.text("sft") == std::fs::read_to_string(expected.join("sft_meta2tid.json")).unwrap());
    }

    #[test]
    fn a_catalogue_without_text_is_an_error() {
        let id2meta = r#"{"1": {"id": "1", "summary_words": ["a", "b", "c", "d", "e"]}}"#;
        let error = Bench::new().input("id2meta", id2meta).run("sft_meta2tid", json!({})).err().unwrap();
        assert!(error.to_string().contains("no item has both"), "{error}");
    }
}
