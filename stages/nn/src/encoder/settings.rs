//! What a model folder says about how it was trained to embed: the files that sentence-transformers writes.

use std::{fs, io::ErrorKind, path::Path};

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use super::Pooling;
use crate::Error;

/// A line of `modules.json`: the steps from a text to its vector.
#[derive(Deserialize)]
struct Module {
    path: String,
    #[serde(rename = "type")]
    kind: String,
}

/// The pooling that the folder names; `None` where it names none.
///
/// # Errors
/// A file is not what it should be, or the model needs a step or a pooling that is not computed here.
pub fn pooling(folder: &Path) -> Result<Option<Pooling>, Error> {
    let modules: Option<Vec<Module>> = read(&folder.join("modules.json"), "a list of modules")?;
    let mut place = "1_Pooling".to_owned();
    for module in modules.into_iter().flatten() {
        match module.kind.rsplit('.').next().unwrap_or_default() {
            "Transformer" | "Normalize" => {}
            "Pooling" => place = module.path,
            other => {
                return Err(Error::model(folder, format!("embeds with a `{other}` layer, which is not computed here"))
                    .help("serve the model elsewhere and name it by `endpoint`"));
            }
        }
    }
    let path = folder.join(place).join("config.json");
    let Some(settings) = read::<Map<String, Value>>(&path, "settings of a pooling layer")? else { return Ok(None) };
    let mut named: Vec<&str> = settings.get("pooling_mode").and_then(Value::as_str).into_iter().collect();
    let flags = settings.iter().filter(|(_, value)| **value == Value::Bool(true));
    named.extend(flags.filter_map(|(name, _)| name.strip_prefix("pooling_mode_")));
    match named.as_slice() {
        [] => Ok(None),
        ["mean" | "mean_tokens"] => Ok(Some(Pooling::Mean)),
        ["cls" | "cls_token"] => Ok(Some(Pooling::Cls)),
        ["lasttoken"] => Ok(Some(Pooling::Last)),
        other => Err(Error::model(&path, format!("pools by `{}`", other.join("` and `")))
            .help("`pooling: mean`, `last` or `cls` overrides it")),
    }
}

/// A JSON file that need not be there.
fn read<T: DeserializeOwned>(path: &Path, what: &str) -> Result<Option<T>, Error> {
    match fs::read(path) {
        Ok(bytes) => {
            serde_json::from_slice(&bytes).map(Some).map_err(|e| Error::model(path, format!("not {what}: {e}")))
        }
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io("read", path, e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(modules: Option<&str>, place: &str, settings: &str) -> Result<Option<Pooling>, String> {
        let folder = tempfile::tempdir().unwrap();
        if let Some(modules) = modules {
            fs::write(folder.path().join("modules.json"), modules).unwrap();
        }
        fs::create_dir(folder.path().join(place)).unwrap();
        fs::write(folder.path().join(place).join("config.json"), settings).unwrap();
        pooling(folder.path()).map_err(|e| e.to_string())
    }

    #[test]
    fn both_layouts_of_the_pooling_file() {
        let old = r#"{"word_embedding_dimension": 384, "pooling_mode_cls_token": false,
            "pooling_mode_mean_tokens": true, "pooling_mode_max_tokens": false, "include_prompt": true}"#;
        assert_eq!(said(None, "1_Pooling", old), Ok(Some(Pooling::Mean)));
        assert_eq!(said(None, "1_Pooling", r#"{"pooling_mode": "cls"}"#), Ok(Some(Pooling::Cls)));
        assert_eq!(said(None, "other", "{}"), Ok(None));
        let modules = r#"[{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "9_Pooling", "type": "sentence_transformers.models.Pooling"}]"#;
        assert_eq!(said(Some(modules), "9_Pooling", r#"{"pooling_mode_lasttoken": true}"#), Ok(Some(Pooling::Last)));
    }

    #[test]
    fn what_is_not_computed_is_refused() {
        let dense = r#"[{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]"#;
        assert!(said(Some(dense), "1_Pooling", "{}").unwrap_err().contains("`Dense` layer"));
        let max = r#"{"pooling_mode_max_tokens": true}"#;
        assert!(said(None, "1_Pooling", max).unwrap_err().contains("pools by `max_tokens`"));
        assert!(said(Some("{}"), "1_Pooling", max).unwrap_err().contains("not a list of modules"));
    }
}
