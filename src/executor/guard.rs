//! A user's own file or folder that an attempt reads and that its keys name by content: an input, a command's code, the
//! folder of a model. Nobody can keep the user from editing it meanwhile, so a worker looks at it before it keeps a
//! row: a row that was computed from other content must not be found under the old one's key.
//!
//! It looks at inode, size and modification, which is a matter of microseconds. The engine digests the same files again
//! before it publishes a result, which also finds an edit that restored its date.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use grlm_cache::Digest;
use serde::{Deserialize, Serialize};

/// How a file or folder looked when the attempt began.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guard {
    pub path: PathBuf,
    looks: Digest,
}

impl Guard {
    /// # Errors
    /// The path cannot be looked at.
    pub fn new(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), looks: looks(path)? })
    }

    /// Whether it still looks as it did. What is gone or cannot be read is taken for unchanged: it may well have been
    /// read in time, and whoever reads it too late will say so.
    pub fn holds(&self) -> bool {
        looks(&self.path).is_ok_and(|now| now == self.looks) || !self.path.exists()
    }
}

fn looks(path: &Path) -> io::Result<Digest> {
    let mut text = String::new();
    look(path, &mut text)?;
    Ok(Digest::of(text.as_bytes()))
}

fn look(path: &Path, text: &mut String) -> io::Result<()> {
    let there = fs::metadata(path)?;
    if there.is_dir() {
        let mut entries = fs::read_dir(path)?.map(|entry| entry.map(|e| e.path())).collect::<io::Result<Vec<_>>>()?;
        entries.sort_unstable();
        return entries.iter().try_for_each(|entry| look(entry, text));
    }
    let (date, fraction) = (there.mtime(), there.mtime_nsec());
    text.push_str(&format!("{path:?} {} {} {} {date}.{fraction}\n", there.dev(), there.ino(), there.len()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edits_of_a_file_and_anywhere_in_a_folder_are_seen() {
        let dir = tempfile::tempdir().unwrap();
        let (file, folder) = (dir.path().join("code.py"), dir.path().join("model"));
        fs::write(&file, "one").unwrap();
        fs::create_dir_all(folder.join("deep")).unwrap();
        fs::write(folder.join("deep/weights"), "one").unwrap();
        let (code, model) = (Guard::new(&file).unwrap(), Guard::new(&folder).unwrap());
        assert!(code.holds() && model.holds());
        fs::write(&file, "longer").unwrap();
        fs::write(folder.join("deep/more"), "").unwrap();
        assert!(!code.holds() && !model.holds());
        let again = Guard::new(&folder).unwrap();
        // The same name and size, another file.
        fs::write(folder.join("deep/new"), "two").unwrap();
        fs::rename(folder.join("deep/new"), folder.join("deep/weights")).unwrap();
        assert!(!again.holds());
        fs::remove_file(&file).unwrap();
        assert!(code.holds(), "gone is not changed");
    }
}
