//! The digest of an input that nobody has hashed yet.

use std::{
    fs::{self, File},
    io,
    path::Path,
};

use crate::StageError;

/// BLAKE3 of a file's bytes, or of the names and digests of everything in a folder; links are followed.
pub(crate) fn content_digest(path: &Path) -> Result<String, StageError> {
    let failed = |error| StageError::io("read", path, error);
    let mut hasher = blake3::Hasher::new();
    if !fs::metadata(path).map_err(failed)?.is_dir() {
        io::copy(&mut File::open(path).map_err(failed)?, &mut hasher).map_err(failed)?;
        return Ok(hasher.finalize().to_hex().to_string());
    }
    let mut entries = fs::read_dir(path).and_then(Iterator::collect::<io::Result<Vec<_>>>).map_err(failed)?;
    entries.sort_unstable_by_key(fs::DirEntry::file_name);
    hasher.update(b"folder");
    for entry in entries {
        let name = entry.file_name();
        let name = name.as_encoded_bytes();
        hasher.update(&(name.len() as u64).to_le_bytes()).update(name);
        hasher.update(content_digest(&entry.path())?.as_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_and_names_count_and_places_do_not() {
        let folder = |name: &str, text: &str| {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir(dir.path().join("sub")).unwrap();
            fs::write(dir.path().join("sub").join(name), text).unwrap();
            content_digest(dir.path()).unwrap()
        };
        assert_eq!(folder("a", "x"), folder("a", "x"));
        assert_ne!(folder("a", "x"), folder("b", "x"));
        assert_ne!(folder("a", "x"), folder("a", "y"));
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("f"), "x").unwrap();
        assert_eq!(content_digest(&dir.path().join("f")).unwrap(), blake3::hash(b"x").to_hex().as_str());
    }
}
