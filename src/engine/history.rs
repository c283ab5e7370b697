//! Which action each stage of a pipeline stood for when it was last run: what `plan` and `explain` compare with.
//!
//! One small file a pipeline and variant, under `latest/` in the store. Losing one loses explanations, no results.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use grlm_cache::{ActionKey, Digest};
use serde::{Deserialize, Serialize};

#[derive(Debug, Default, Serialize, Deserialize)]
struct Latest {
    /// The pipeline's title, for people who look into the file.
    pipeline: String,
    /// Stage → key.
    stages: BTreeMap<String, ActionKey>,
}

/// The last action of each stage of one pipeline.
#[derive(Debug)]
pub struct History {
    file: PathBuf,
    latest: Latest,
    changed: bool,
}

impl History {
    /// Reads what is known of the pipeline with this title; nothing, if its file is missing or damaged.
    pub fn open(store: &Path, title: &str) -> Self {
        let name = Digest::of(title.as_bytes()).to_string();
        let file = store.join("latest").join(format!("{}.json", &name[..32]));
        let latest = fs::read(&file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        Self { file, latest, changed: false }
    }

    pub fn last(&self, stage: &str) -> Option<ActionKey> {
        self.latest.stages.get(stage).copied()
    }

    pub fn remember(&mut self, stage: &str, key: ActionKey) {
        if self.last(stage) != Some(key) {
            self.latest.stages.insert(stage.to_owned(), key);
            self.changed = true;
        }
    }

    /// Writes the file, whole or not at all, if anything changed. What another run remembered meanwhile about other
    /// stages is kept.
    ///
    /// # Errors
    /// No space, no permission.
    pub fn write(&mut self, title: &str) -> io::Result<()> {
        if !self.changed {
            return Ok(());
        }
        let folder = self.file.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        let now: Latest =
            fs::read(&self.file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        let mut merged = now.stages;
        merged.append(&mut self.latest.stages);
        self.latest = Latest { pipeline: title.to_owned(), stages: merged };
        let mut temporary = tempfile::NamedTempFile::new_in(folder)?;
        serde_json::to_writer(&mut temporary, &self.latest)?;
        temporary.persist(&self.file)?;
        self.changed = false;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_remembered_is_read_again_and_a_neighbours_word_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let key = |text: &str| ActionKey(Digest::of(text.as_bytes()));
        let mut one = History::open(dir.path(), "p@v");
        let mut other = History::open(dir.path(), "p@v");
        one.remember("a", key("1"));
        one.write("p@v").unwrap();
        other.remember("b", key("2"));
        other.write("p@v").unwrap();
        let read = History::open(dir.path(), "p@v");
        assert_eq!((read.last("a"), read.last("b")), (Some(key("1")), Some(key("2"))));
        assert_eq!(History::open(dir.path(), "p").last("a"), None);
    }
}
