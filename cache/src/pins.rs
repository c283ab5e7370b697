//! Pins: names under which a user keeps results whatever their age and size. A pin is a small file, `pins/<name>.json`.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::digest::ActionKey;
use crate::record::list;
use crate::signature::now;
use crate::store::Store;
use crate::{Result, StoreError};

/// Results kept under a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    pub name: String,
    /// What it is, for people: the pipeline, or the run.
    pub of: String,
    /// Milliseconds since 1970.
    pub since_ms: u64,
    pub actions: BTreeSet<ActionKey>,
}

impl Store {
    /// Keeps these actions under `name`, replacing what it kept before.
    ///
    /// # Errors
    /// A name that is no file name, or a store that cannot be written.
    pub fn pin(&self, name: &str, of: &str, actions: BTreeSet<ActionKey>) -> Result<Pin> {
        let path = self.pin_path(name)?;
        let since_ms = u64::try_from(now() / 1_000_000).unwrap_or(0);
        let pin = Pin { name: name.to_owned(), of: of.to_owned(), since_ms, actions };
        let text = serde_json::to_vec_pretty(&pin).map_err(|error| StoreError::io("write", &path, error.into()))?;
        let mut staged = self.temporary()?;
        staged.write_all(&text).map_err(StoreError::while_doing("write", staged.path()))?;
        staged.as_file().sync_all().map_err(StoreError::while_doing("sync", staged.path()))?;
        let folder = self.root.join("pins");
        fs::create_dir_all(&folder).map_err(StoreError::while_doing("create the folder", &folder))?;
        staged.persist(&path).map_err(|error| StoreError::io("place", &path, error.error))?;
        Ok(pin)
    }

    /// Lets go of a name. What it kept stays until it is collected.
    ///
    /// # Errors
    /// If nothing is called so.
    pub fn unpin(&self, name: &str) -> Result<()> {
        let path = self.pin_path(name)?;
        fs::remove_file(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => StoreError::Unknown { what: "pin", name: name.to_owned() },
            _ => StoreError::io("remove", &path, error),
        })
    }

    /// All pins, by name.
    ///
    /// # Errors
    /// A pin that cannot be read: what it keeps is not known, so nothing may be collected.
    pub fn pins(&self) -> Result<Vec<Pin>> {
        let mut pins = Vec::new();
        for entry in list(&self.root.join("pins"))? {
            let path = entry.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                let text = fs::read(&path).map_err(StoreError::while_doing("read", &path))?;
                let pin: Pin = serde_json::from_slice(&text)
                    .map_err(|error| StoreError::io("read the pin", &path, error.into()))?;
                pins.push(pin);
            }
        }
        pins.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(pins)
    }

    /// Whether [`Store::pin`] could keep something by this name.
    ///
    /// # Errors
    /// It could not.
    pub fn check_pin(&self, name: &str) -> Result<()> {
        self.pin_path(name).map(|_| ())
    }

    fn pin_path(&self, name: &str) -> Result<PathBuf> {
        self.require_write()?;
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if name.is_empty() || name.len() > 100 || name.starts_with('.') || !name.chars().all(fits) {
            return Err(StoreError::BadName { what: "a pin", name: name.to_owned() });
        }
        Ok(self.root.join("pins").join(format!("{name}.json")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{key, store};

    #[test]
    fn pins_are_named_listed_and_let_go() {
        let (_dir, store) = store();
        assert!(store.pins().unwrap().is_empty());
        store.pin("b", "p", BTreeSet::from([key(1)])).unwrap();
        let pin = store.pin("a", "p@v", BTreeSet::from([key(1), key(2)])).unwrap();
        assert_eq!(store.pins().unwrap()[0], pin);
        store.unpin("b").unwrap();
        assert!(matches!(store.unpin("b"), Err(StoreError::Unknown { .. })));
        assert_eq!(store.pins().unwrap().len(), 1);
        for name in ["", ".", "../x", "a/b", "ä"] {
            assert!(matches!(store.pin(name, "", BTreeSet::new()), Err(StoreError::BadName { .. })), "{name}");
        }
        fs::write(store.root().join("pins/c.json"), "{").unwrap();
        assert!(store.pins().is_err(), "a pin that cannot be read is not no pin");
    }
}
