//! The models that parameters name: the digest of what in a folder can change a result, and what running one takes.

use std::{fs, path::Path};

use crate::{Resources, StageError, hub::ModelName};

/// Endings of files that tokenizers, configurations and weights are in.
const COUNTED: [&str; 5] = ["json", "jinja", "model", "safetensors", "txt"];
/// The one folder inside a model's that changes what it computes.
const POOLING: &str = "1_Pooling";

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

/// The digest of the configuration, tokenizer and weights in `folder`, as 64 hexadecimal digits. Anything else in it
/// (a model card) does not count.
///
/// # Errors
/// A file cannot be read.
pub fn digest(folder: &Path) -> Result<String, StageError> {
    let mut files = Vec::new();
    for part in [folder.to_owned(), folder.join(POOLING)] {
        let Ok(entries) = fs::read_dir(&part) else { continue };
        for entry in entries {
            let path = entry.map_err(|e| StageError::io("read", &part, e))?.path();
            let counted = path.extension().and_then(|e| e.to_str()).is_some_and(|e| COUNTED.contains(&e));
            if counted && path.is_file() {
                files.push(path);
            }
        }
    }
    files.sort();
    let mut all = blake3::Hasher::new();
    for path in files {
        let name = path.strip_prefix(folder).unwrap_or(&path).to_string_lossy().into_owned();
        let mut one = blake3::Hasher::new();
        one.update_mmap_rayon(&path).map_err(|e| StageError::io("read", &path, e))?;
        all.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes()).update(one.finalize().as_bytes());
    }
    Ok(all.finalize().to_hex().to_string())
}

/// What an attempt needs that runs a model here, or asks a server.
pub fn resources(endpoint: bool) -> Resources {
    Resources::cpus(if endpoint { 1 } else { 2 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_computes_is_in_the_digest() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        write("config.json", "{}");
        write("model.safetensors", "weights");
        let first = digest(folder.path()).unwrap();
        write("README.md", "a card");
        assert_eq!(digest(folder.path()).unwrap(), first);
        write("model.safetensors", "other weights");
        let second = digest(folder.path()).unwrap();
        assert_ne!(second, first);
        fs::create_dir(folder.path().join(POOLING)).unwrap();
        write("1_Pooling/config.json", "{}");
        assert_ne!(digest(folder.path()).unwrap(), second);
    }

    #[test]
    fn names_of_folders_and_of_the_hub() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_string_lossy();
        assert_eq!(name(&path, Some("v1")), path);
        assert!(is_at_hand(&path));
        assert_eq!(name("Qwen/Qwen3-4B", Some("v1")), "Qwen/Qwen3-4B@v1");
        assert!(!is_at_hand("Qwen/Qwen3-4B@v1") && !is_at_hand("/no/such/folder"));
    }
}
