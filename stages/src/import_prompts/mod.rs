//! Stage `import_prompts`: prompt texts taken out of the Python scripts that hold them, as a `prompts` file.
//!
//! The published scripts' texts are not ours to hand on; with the scripts at hand (a clone, or `fetch`) this stage makes
//! of them what `compat: reference` needs. A script's plain texts (literals, joined or not, that are assigned to a name
//! or a key) are looked through by these rules:
//!
//! | script | text | found as |
//! |---|---|---|
//! | `tid` | `tid_extraction` | the longest text with fields for a title and for neighbours |
//! | `meta2tid`, `collaborative` | `input` | the longest text with fields among those of a target that starts with `input` |
//! | `meta2tid`, `rec`, `collaborative` | `instruction` | the longest text of a target whose name holds `instruction` |
//!
//! A field of a formatted text becomes the placeholder that its expression is about: similar items or neighbours, title,
//! description, a count (`len(…)`), or else the item; `fields` says so where that guess is wrong. Texts of scripts that
//! are not connected stay the built-in ones.

use std::{collections::BTreeMap, path::Path};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    Artifact, Ports, Stage, StageContext, StageError,
    artifact::text,
    prompts::Prompts,
    stage::{Input, Output},
};

mod literals;

use literals::{Assigned, Part};

pub struct ImportPrompts;

/// Parameters of `import_prompts`.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// What the fields of formatted texts stand for where their names do not tell: expression, as the script has it, to
    /// placeholder (`title_line`, `description_line`, `neighbor_lines`, `item_line`, `count`).
    pub fields: BTreeMap<String, String>,
}

impl Stage for ImportPrompts {
    const KIND: &'static str = "import_prompts";
    const SUMMARY: &'static str = "prompt texts taken out of published Python scripts";
    type Params = Params;

    fn ports(_: &Params) -> Ports {
        Ports::new(
            [
                Input::optional("tid", Artifact::Any, "the script that asks a model for items' TIDs"),
                Input::optional("meta2tid", Artifact::Any, "the script that builds samples from item to TID"),
                Input::optional("rec", Artifact::Any, "the script that builds samples from users' histories"),
                Input::optional("collaborative", Artifact::Any, "the script that builds samples from similar items"),
            ],
            [Output::new("prompts", Artifact::Prompts, "prompts.json", "the texts, as the `prompts` ports read them")],
        )
    }

    fn run(params: &Params, cx: &mut StageContext) -> Result<(), StageError> {
        let mut prompts = Prompts::built_in()?;
        if cx.inputs().next().is_none() {
            return Err(StageError::params("no script is connected").help("connect `tid`, `meta2tid`, `rec` or more"));
        }
        let script = |port| cx.optional_input(port).map(|path| Script::read(path, params)).transpose();
        if let Some(script) = script("tid")? {
            prompts.tid_extraction = script.longest("text with a title and neighbours", |text| {
                text.names.contains(&"title_line") && text.names.contains(&"neighbor_lines")
            })?;
        }
        if let Some(script) = script("meta2tid")? {
            prompts.sft_meta2tid.instruction = script.instruction()?;
            prompts.sft_meta2tid.input = script.input()?;
        }
        if let Some(script) = script("rec")? {
            prompts.sft_rec.instruction = script.instruction()?;
        }
        if let Some(script) = script("collaborative")? {
            prompts.sft_collaborative.instruction = script.instruction()?;
            prompts.sft_collaborative.input = script.input()?;
        }
        prompts.check().map_err(|message| {
            StageError::params(format!("the texts that were found do not fit: {message}"))
                .help("say what the fields stand for: `with: { fields: { EXPRESSION: PLACEHOLDER } }`")
        })?;
        for port in ["tid", "meta2tid", "rec", "collaborative"] {
            if cx.optional_input(port).is_none() {
                cx.info(format!("`{port}` is not connected: its texts are the built-in ones"));
            }
        }
        let path = cx.output("prompts")?;
        let json = serde_json::to_string_pretty(&prompts).map_err(|e| StageError::bug(e.to_string()))?;
        std::fs::write(path, json + "\n").map_err(|e| StageError::io("write", path, e))
    }
}

/// A script's texts, their fields made placeholders.
struct Script<'a> {
    path: &'a Path,
    texts: Vec<Text>,
}

struct Text {
    /// What it is assigned to, in lower case.
    target: String,
    template: String,
    names: Vec<&'static str>,
}

const PLACEHOLDERS: [&str; 5] = ["title_line", "description_line", "neighbor_lines", "item_line", "count"];

impl<'a> Script<'a> {
    fn read(path: &'a Path, params: &Params) -> Result<Self, StageError> {
        let source = text::read(path)?;
        let assigned = literals::assigned(&source)
            .map_err(|e| StageError::input_at(path, e.line, e.message).help("is it a Python script, and whole?"))?;
        let texts = assigned.into_iter().map(|a| Text::new(a, params)).collect::<Result<_, _>>()?;
        Ok(Self { path, texts })
    }

    fn longest(&self, what: &str, fits: impl Fn(&Text) -> bool) -> Result<String, StageError> {
        let found = self.texts.iter().filter(|text| fits(text)).max_by_key(|text| text.template.len());
        found.map(|text| text.template.clone()).ok_or_else(|| {
            StageError::input(self.path, format!("holds no {what}")).help("is it the right script for this port?")
        })
    }

    fn instruction(&self) -> Result<String, StageError> {
        self.longest("text that is called instruction", |text| text.target.contains("instruction"))
    }

    fn input(&self) -> Result<String, StageError> {
        self.longest("text with fields that is called input", |text| {
            text.target.starts_with("input") && !text.names.is_empty()
        })
    }
}

impl Text {
    fn new(assigned: Assigned, params: &Params) -> Result<Self, StageError> {
        let mut text = Self { target: assigned.target.to_lowercase(), template: String::new(), names: Vec::new() };
        for part in assigned.parts {
            match part {
                Part::Text(words) => text.template.push_str(&words),
                Part::Field(expression) => {
                    let name = placeholder(&expression, params)?;
                    text.template.push_str(&format!("{{{name}}}"));
                    text.names.push(name);
                }
            }
        }
        Ok(text)
    }
}

/// What an expression of a formatted text stands for.
fn placeholder(expression: &str, params: &Params) -> Result<&'static str, StageError> {
    if let Some(name) = params.fields.get(expression) {
        return PLACEHOLDERS.into_iter().find(|known| known == name).ok_or_else(|| {
            StageError::params(format!("`fields`: there is no placeholder `{name}`"))
                .help(format!("one of {}", PLACEHOLDERS.join(", ")))
        });
    }
    let words = expression.to_lowercase();
    let about = |some: &[&str]| some.iter().any(|word| words.contains(word));
    Ok(if about(&["len(", "count", "num_"]) {
        "count"
    } else if about(&["similar", "neighbor", "neighbour"]) {
        "neighbor_lines"
    } else if about(&["title"]) {
        "title_line"
    } else if about(&["desc"]) {
        "description_line"
    } else {
        "item_line"
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::testing::{Bench, refuses};

    const TID: &str = r#"
import re
def ask(item, others, everything):
    """A docstring is no text."""
    title_text = f"Title: {item['title']}"
    line = f"{other['id']} ({score:.3f}):"
    question = f"""Say what it is:
{title_text}
{description_text}
Beside it:
{similar_items_text}
As in {{a}}: [one, two]"""
    return question
"#;
    const META2TID: &str = "data[\"instruction\"] = '''Name it.\n\\\n1. shortly'''\n\
        data['input'] = f\"\"\"\\n\\nIt is:\\n{title}\\n{description}\\nSo:\"\"\"\n\
        data[\"output\"] = \"[\" + \", \".join(words) + \"]\"\n";
    const REC: &str = "def sample(words):\n    instruction = (\n        \"What is \" # a comment\n        'next?\\n'\n    )\n    \
        input_text = \"Item: [\" + \", \".join(words) + \"]\"\n    return {\"instruction\": instruction, \"input\": input_text}\n";
    const COLLABORATIVE: &str = "instruction = \"\"\"What goes\nwith it?\"\"\"\n\
        input_text = f\"\"\"\n{show(item, \"x\")}\n\nName {len(good)} more:\"\"\"\n";

    fn texts(tid: &str, with: Value) -> Result<Value, crate::StageError> {
        let ran = Bench::new()
            .input("tid", tid)
            .input("meta2tid", META2TID)
            .input("rec", REC)
            .input("collaborative", COLLABORATIVE)
            .run("import_prompts", with)?;
        Ok(ran.json("prompts"))
    }

    #[test]
    fn texts_are_found_in_all_four_scripts() {
        let prompts = texts(TID, json!({})).unwrap_err();
        // `{a}` in the made-up text is a placeholder that nobody fills.
        assert!(prompts.to_string().contains("unknown placeholder `{a}`"), "{prompts}");
        let prompts = texts(&TID.replace("{{a}}", "{{A}}"), json!({})).unwrap();
        assert_eq!(
            prompts,
            json!({
                "tid_extraction": "Say what it is:\n{title_line}\n{description_line}\nBeside it:\n{neighbor_lines}\nAs in {A}: [one, two]",
                "sft_meta2tid": {
                    "instruction": "Name it.\n1. shortly",
                    "input": "\n\nIt is:\n{title_line}\n{description_line}\nSo:",
                },
                "sft_rec": { "instruction": "What is next?\n" },
                "sft_collaborative": {
                    "instruction": "What goes\nwith it?",
                    "input": "\n{item_line}\n\nName {count} more:",
                },
            })
        );
    }

    #[test]
    fn the_file_is_read_by_the_stages_that_take_prompts() {
        let ran = Bench::new().input("rec", REC).run("import_prompts", json!({})).unwrap();
        let prompts = crate::prompts::Prompts::load(Some(ran.path("prompts"))).unwrap();
        assert_eq!(prompts.sft_rec.instruction, "What is next?\n");
        assert_eq!(prompts.tid_extraction, crate::prompts::Prompts::built_in().unwrap().tid_extraction);
        assert_eq!(ran.logs().len(), 3);
    }

    #[test]
    fn fields_with_other_names_can_be_told() {
        let odd = TID.replace("{{a}}", "").replace("{similar_items_text}", "{zzz}");
        let refused = |tid: &str, with: Value, words: &[&str]| {
            refuses(Bench::new().input("tid", tid).run("import_prompts", with), words);
        };
        refused(&odd, json!({}), &["no text with a title and neighbours", "right script"]);
        let prompts = texts(&odd, json!({"fields": {"zzz": "neighbor_lines"}})).unwrap();
        assert!(prompts["tid_extraction"].as_str().unwrap().contains("{neighbor_lines}"));
        refused(&odd, json!({"fields": {"zzz": "nonsense"}}), &["nonsense", "title_line"]);
    }

    #[test]
    fn scripts_without_the_texts_are_refused() {
        let run = |tid: &str| Bench::new().input("tid", tid).run("import_prompts", json!({}));
        refuses(run("x = 1\n"), &["input-tid", "no text with a title"]);
        refuses(run("x = '''cut off"), &["input-tid:1", "text without an end", "whole"]);
        refuses(Bench::new().run("import_prompts", json!({})), &["no script is connected"]);
    }
}
