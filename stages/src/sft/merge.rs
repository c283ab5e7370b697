//! Stage `sft_merge`: training files joined into one array, and the entry that LlamaFactory wants for it.
//!
//! Recommendation samples first, then item naming, then collaborative ones: the published order. Samples pass through
//! as they are, fields beyond the three of alpaca included. There is nothing to set right here, hence no `compat`.

use std::{fmt, path::Path};

use schemars::JsonSchema;
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{Error, SeqAccess, Visitor},
};
use serde_json::{Map, Value, json};

use super::samples::ArrayWriter;
use crate::{
    Artifact, ParamIssue, Ports, Stage, StageContext, StageError,
    artifact::{python_json, text},
    stage::{Input, Output},
};

pub struct SftMerge;

/// Parameters of `sft_merge`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// The name of the data set in `dataset_info.json`.
    pub name: String,
}

impl Default for Params {
    fn default() -> Self {
        Self { name: "grlm".into() }
    }
}

const FILE: &str = "sft_merged.json";

/// The input ports, in the order in which their samples are written.
const PARTS: [&str; 3] = ["rec", "meta2tid", "collaborative"];

impl Stage for SftMerge {
    const KIND: &'static str = "sft_merge";
    const SUMMARY: &'static str = "training files in one, with LlamaFactory's dataset_info.json";
    type Params = Params;

    fn ports(_: &Params) -> Ports {
        Ports::new(
            [
                Input::optional("rec", Artifact::Sft, "samples of `sft_rec`; come first"),
                Input::optional("meta2tid", Artifact::Sft, "samples of `sft_meta2tid`; come second"),
                Input::optional("collaborative", Artifact::Sft, "samples of `sft_collaborative`; come last"),
            ],
            [
                Output::new("sft", Artifact::Sft, FILE, "all samples"),
                Output::new(
                    "dataset_info",
                    Artifact::DatasetInfo,
                    "dataset_info.json",
                    "LlamaFactory's entry for them",
                ),
            ],
        )
    }

    fn check(params: &Params) -> Vec<ParamIssue> {
        if params.name.trim().is_empty() { vec![ParamIssue::new("name", "must not be empty")] } else { Vec::new() }
    }

    fn run(params: &Params, cx: &mut StageContext) -> Result<(), StageError> {
        let mut writer = ArrayWriter::create(cx.output("sft")?)?;
        let mut counts = Vec::new();
        for part in PARTS {
            if let Some(path) = cx.optional_input(part) {
                let count = copy_samples(path, &mut writer)?;
                if count == 0 {
                    return Err(StageError::input(path, format!("holds no sample for `{part}`")));
                }
                counts.push(format!("{count} of `{part}`"));
            }
            cx.check_stop()?;
        }
        if counts.is_empty() {
            return Err(StageError::params("no input is connected")
                .help("connect at least one of `rec`, `meta2tid` and `collaborative`"));
        }
        let samples = writer.finish()?;
        let info = json!({
            &params.name: {
                "file_name": FILE,
                "columns": {"prompt": "instruction", "query": "input", "response": "output"}
            }
        });
        let mut out = Vec::new();
        python_json::write_pretty(&mut out, &info, 0);
        let path = cx.output("dataset_info")?;
        std::fs::write(path, out).map_err(|e| StageError::io("write", path, e))?;
        cx.info(format!("{samples} samples: {}", counts.join(", ")));
        Ok(())
    }
}

/// Copies a file's samples, one in memory at a time.
fn copy_samples(path: &Path, writer: &mut ArrayWriter) -> Result<u64, StageError> {
    let text = text::read(path)?;
    let mut failed = None;
    let mut deserializer = serde_json::Deserializer::from_str(&text);
    let copied = deserializer.deserialize_seq(Copier { writer, failed: &mut failed });
    match (failed, copied.and_then(|count| deserializer.end().map(|()| count))) {
        (Some(error), _) => Err(error),
        (None, copied) => copied.map_err(|e| text::json_error(path, &e, "an array of samples")),
    }
}

/// Writes every element as it is read.
struct Copier<'a> {
    writer: &'a mut ArrayWriter,
    /// Where an error of writing goes: it is not one of parsing.
    failed: &'a mut Option<StageError>,
}

impl<'de> Visitor<'de> for Copier<'_> {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of samples")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<u64, A::Error> {
        let mut count = 0;
        while let Some(sample) = elements.next_element::<Map<String, Value>>()? {
            for field in ["instruction", "input", "output"] {
                if !sample.get(field).is_some_and(Value::is_string) {
                    return Err(A::Error::custom(format!("sample {} has no text `{field}`", count + 1)));
                }
            }
            if let Err(error) = self.writer.push(|out| python_json::write_object(out, &sample, 1)) {
                *self.failed = Some(error);
                return Err(A::Error::custom("the output cannot be written"));
            }
            count += 1;
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{Bench, shared_data};
    use serde_json::json;

    #[test]
    fn parts_follow_each_other_in_the_published_order() {
        let sample =
            |text: &str| json!([{"instruction": text, "input": "", "output": "é\n", "system": "s"}]).to_string();
        let ran = Bench::new()
            .input("collaborative", sample("3"))
            .input("rec", sample("1"))
            .run("sft_merge", json!({"name": "beauty"}))
            .unwrap();
        let merged = ran.json("sft");
        assert_eq!(
            merged.as_array().unwrap().iter().map(|s| s["instruction"].as_str().unwrap()).collect::<Vec<_>>(),
            ["1", "3"]
        );
        assert_eq!(merged[0]["system"], "s");
        assert_eq!(ran.json("dataset_info")["beauty"]["file_name"], "sft_merged.json");
        assert_eq!(ran.logs(), ["2 samples: 1 of `rec`, 1 of `collaborative`"]);
    }

    #[test]
    fn what_is_no_sample_is_refused() {
        for (rec, message) in [
            ("[{\"instruction\": \"\", \"input\": \"\", \"output\": \"\"},\n", ":2: not an array of samples: EOF"),
            ("{}", "not an array of samples: invalid type: map"),
            ("[]", "holds no sample for `rec`"),
            ("[{\"instruction\": \"\"}]", "sample 1 has no text `input`"),
            ("[5]", "invalid type: integer"),
        ] {
            let error = Bench::new().input("rec", rec).run("sft_merge", json!({})).err().unwrap().to_string();
            assert!(error.contains(message), "{rec:?}: {error}");
        }
        let error = Bench::new().run("sft_merge", json!({})).err().unwrap().to_string();
        assert!(error.contains("no input is connected"), "{error}");
    }

    #[test]
    fn the_published_file_comes_out_byte_for_byte() {
        let Some(data) = shared_data() else { return };
        let expected = data.join("golden/quirks/expected");
        let ran = Bench::new()
            .input_path("rec", expected.join("sft_rec_simplified.json"))
            .input_path("meta2tid", expected.join("sft_meta2tid.json"))
            .run("sft_merge", json!({}))
            .unwrap();
        assert!(ran.text("sft") == std::fs::read_to_string(expected.join("sft_merged_rec_meta2tid.json")).unwrap());
    }
}
