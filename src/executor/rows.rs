//! The rows of the store as a worker sees them: what a stage's row job looks up, and where it keeps what it computes.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    io,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use grlm_cache::{
    Access, Digest, StoreError,
    rows::{Namespace, RowRef, RowStore},
};
use grlm_stages::{
    StageError,
    rows::{RowKey, RowMemo, RowResult},
};

use super::guard::Guard;

/// The namespaces that were used so far.
pub type Namespaces = Arc<Mutex<BTreeSet<String>>>;

/// Keeps rows in a store. Each namespace is opened when it is first used.
#[derive(Debug)]
pub struct StoreRows {
    store: RowStore,
    open: BTreeMap<String, Namespace>,
    used: Namespaces,
    guards: Vec<Guard>,
}

impl StoreRows {
    /// `folder` is the store's folder of rows; what is used of it is noted in `used`. Rows are kept as
    /// long as the `guards` hold.
    pub fn new(folder: &Path, used: Namespaces, guards: Vec<Guard>) -> Self {
        Self { store: RowStore::at(folder, Access::Write), open: BTreeMap::new(), used, guards }
    }

    fn with<T>(
        &mut self,
        namespace: &str,
        act: impl FnOnce(&mut Namespace) -> Result<T, StoreError>,
    ) -> Result<T, StageError> {
        let opened = match self.open.entry(namespace.to_owned()) {
            Entry::Occupied(entry) => Ok(entry.into_mut()),
            Entry::Vacant(entry) => self.store.namespace(namespace).map(|opened| {
                self.used.lock().unwrap_or_else(PoisonError::into_inner).insert(namespace.to_owned());
                entry.insert(opened)
            }),
        };
        opened.and_then(act).map_err(|error| failed(&self.store, error))
    }
}

/// What the engine makes of a store that fails under a stage: something outside failed.
fn failed(store: &RowStore, error: StoreError) -> StageError {
    StageError::io("use the rows in", store.folder(), io::Error::other(error))
}

fn digests(keys: &[RowKey]) -> Vec<Digest> {
    keys.iter().map(|key| Digest::from_bytes(*key.as_bytes())).collect()
}

impl RowMemo for StoreRows {
    fn look_up(&mut self, namespace: &str, keys: &[RowKey]) -> Result<Vec<Option<Vec<u8>>>, StageError> {
        self.with(namespace, |rows| rows.look_up(&digests(keys)))
    }

    fn append(&mut self, namespace: &str, results: &[(RowKey, &RowResult)]) -> Result<(), StageError> {
        if let Some(broken) = self.guards.iter().find(|guard| !guard.holds()) {
            let help = "what was computed since is not kept; run again";
            return Err(StageError::input(&broken.path, "it changed while the stage ran").help(help));
        }
        // The store keeps texts: a failure with the name of its row.
        let failures: Vec<String> = results
            .iter()
            .map(|(_, result)| result.as_ref().err().map_or_else(String::new, ToString::to_string))
            .collect();
        let rows = results.iter().zip(&failures).map(|((key, result), failure)| {
            let row = match result {
                Ok(bytes) => RowRef::Result(bytes),
                Err(_) => RowRef::Failure(failure),
            };
            (Digest::from_bytes(*key.as_bytes()), row)
        });
        self.with(namespace, |namespace| namespace.append(rows))
    }

    /// Also closes the segments, and merges small ones if there are many.
    fn sync(&mut self) -> Result<(), StageError> {
        for rows in self.open.values_mut() {
            rows.close_segment().map_err(|error| failed(&self.store, error))?;
            if let Err(error) = rows.compact_if_needed() {
                tracing::warn!(%error, "segments of rows stay as they are");
            }
        }
        Ok(())
    }

    fn claim(&mut self, namespace: &str, keys: &[RowKey]) -> Result<Vec<bool>, StageError> {
        self.with(namespace, |rows| rows.claim(&digests(keys)))
    }

    fn release(&mut self, namespace: &str, keys: &[RowKey]) -> Result<(), StageError> {
        self.with(namespace, |rows| {
            rows.release(&digests(keys));
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use grlm_stages::rows::{RowFailure, RowRecipe};

    #[test]
    fn what_one_attempt_keeps_another_finds_and_claims_keep_them_apart() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("store/rows");
        let used = Namespaces::default();
        let (mut one, mut two) = (
            StoreRows::new(&folder, Arc::clone(&used), vec![]),
            StoreRows::new(&folder, Namespaces::default(), vec![]),
        );
        let recipe = RowRecipe::new("n", 1);
        let keys: Vec<RowKey> = (0..3).map(|n| recipe.row().number("n", n).key()).collect();
        assert_eq!(one.look_up("n", &keys).unwrap(), [None, None, None]);
        assert_eq!(one.claim("n", &keys[..2]).unwrap(), [true, true]);
        assert_eq!(two.claim("n", &keys).unwrap(), [false, false, true]);
        let failure = Err(RowFailure::new("no answer"));
        one.append("n", &[(keys[0], &Ok(b"r0".to_vec())), (keys[1], &failure)]).unwrap();
        one.release("n", &keys[..2]).unwrap();
        assert_eq!(two.look_up("n", &keys).unwrap(), [Some(b"r0".to_vec()), None, None]);
        assert_eq!(two.claim("n", &keys[..2]).unwrap(), [true, true]);
        one.sync().unwrap();
        let error = one.look_up("../n", &keys).unwrap_err();
        assert!(std::error::Error::source(&error).unwrap().to_string().contains("../n"), "{error}");
        assert_eq!(*used.lock().unwrap(), BTreeSet::from(["n".to_owned()]));
    }
}
