//! Scratch: where attempts of an action work. It stays when an attempt fails, with its checkpoints, and goes when the
//! action is published.

use std::fs;
use std::io;
use std::path::PathBuf;

use crate::digest::ActionKey;
use crate::steps::{Step, reach};
use crate::store::Store;
use crate::{Result, StoreError};

impl Store {
    /// The folder that all attempts of an action share. It may not exist yet.
    pub fn scratch(&self, key: &ActionKey) -> PathBuf {
        self.root.join("scratch").join(key.0.hex())
    }

    /// A new empty folder for one attempt, on the same disk as the blobs, so that its outputs can be moved.
    pub fn new_attempt(&self, key: &ActionKey) -> Result<PathBuf> {
        self.require_write()?;
        let scratch = self.scratch(key);
        for number in 1u32.. {
            let attempt = scratch.join(format!("attempt-{number}"));
            let made = fs::create_dir(&attempt).or_else(|error| match error.kind() {
                io::ErrorKind::NotFound => fs::create_dir_all(&scratch).and_then(|()| fs::create_dir(&attempt)),
                _ => Err(error),
            });
            match made {
                Ok(()) => return Ok(attempt),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(StoreError::io("create the folder", &attempt, error)),
            }
        }
        Err(StoreError::io("create a folder in", &scratch, io::ErrorKind::QuotaExceeded.into()))
    }

    /// Removes the scratch of an action, if there is any.
    pub fn clear_scratch(&self, key: &ActionKey) -> Result<()> {
        self.require_write()?;
        let scratch = self.scratch(key);
        match fs::remove_dir_all(&scratch) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StoreError::io("remove", &scratch, error)),
            _ => reach(Step::ScratchCleared, &scratch),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{key, store};

    #[test]
    fn attempts_are_apart_and_cleared_together() {
        let (_dir, store) = store();
        let first = store.new_attempt(&key(1)).unwrap();
        let second = store.new_attempt(&key(1)).unwrap();
        assert_ne!(first, second);
        assert!(first.starts_with(store.scratch(&key(1))));
        store.clear_scratch(&key(1)).unwrap();
        store.clear_scratch(&key(1)).unwrap();
        assert!(!first.exists() && !second.exists());
    }
}
