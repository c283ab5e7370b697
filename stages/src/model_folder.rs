//! The models that parameters name: whether they can be there, and what running one takes.

use std::path::Path;

use grlm_nn::qwen3::weights::Weights;

use crate::{ParamIssue, Resources, hub::ModelName};

/// A model as [`crate::Stage::models`] names it.
pub fn name(model: &str, revision: Option<&str>) -> String {
    match revision {
        Some(revision) if !Path::new(model).is_dir() => format!("{model}@{revision}"),
        _ => model.to_owned(),
    }
}

/// Whether the model of this name is on disk, so that looking at it takes no network.
pub fn is_at_hand(name: &str) -> bool {
    matches!(ModelName::parse(name), Ok(ModelName::Folder(folder)) if folder.is_dir())
}

/// What is wrong with the files of a folder's weights, as far as their headers tell.
pub fn damage(folder: &Path) -> Option<String> {
    Weights::map(folder).err().map(|error| error.to_string())
}

/// What is wrong with a model's name before anything runs: it is a path at which no folder is, or no name at all.
pub fn issue(place: &str, name: &str) -> Option<ParamIssue> {
    let message = match ModelName::parse(name) {
        _ if Path::new(name).is_file() => format!("`{name}` is a file"),
        Ok(ModelName::Folder(folder)) if !folder.is_dir() => format!("`{name}` is not a folder"),
        Ok(_) => return None,
        Err(message) => message,
    };
    Some(ParamIssue::new(place, message).help("give a model's folder, or `organisation/name` of the hub"))
}

/// What an attempt needs that runs a model here, or asks a server.
pub fn resources(endpoint: bool) -> Resources {
    Resources::cpus(if endpoint { 1 } else { 2 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_folders_and_of_the_hub() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_string_lossy();
        assert_eq!(name(&path, Some("v1")), path);
        assert!(is_at_hand(&path));
        assert_eq!(name("Qwen/Qwen3-4B", Some("v1")), "Qwen/Qwen3-4B@v1");
        assert!(!is_at_hand("Qwen/Qwen3-4B@v1") && !is_at_hand("/no/such/folder"));
    }

    #[test]
    fn weights_that_are_cut_short_are_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let whole = concat!(env!("CARGO_MANIFEST_DIR"), "/nn/tests/fixtures/encoders/bert");
        assert_eq!(damage(Path::new(whole)), None);
        let bytes = std::fs::read(Path::new(whole).join("model.safetensors")).unwrap();
        std::fs::write(folder.path().join("model.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
        assert!(damage(folder.path()).is_some_and(|what| what.contains("not a whole safetensors file")));
    }

    #[test]
    fn a_path_without_a_folder_is_found_before_anything_runs() {
        let folder = tempfile::tempdir().unwrap();
        assert!(issue("model", &folder.path().to_string_lossy()).is_none());
        assert!(issue("model", "Qwen/Qwen3-4B@v1").is_none());
        let file = folder.path().join("weights");
        std::fs::write(&file, "").unwrap();
        assert!(issue("model", &file.to_string_lossy()).unwrap().message.ends_with("is a file"));
        for wrong in ["/no/such/folder", "./none", "~/no/such/folder", "word"] {
            let issue = issue("model", wrong).unwrap();
            assert!(issue.path == "model" && issue.message.contains(wrong), "{issue:?}");
        }
    }
}
