//! Where results of rows are kept: the trait that the framework works with, and the one that keeps them in memory.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{RowFailure, RowKey, RowResult};
use crate::StageError;

/// Keeps results of rows by namespace and key. What was appended survives everything that follows: a kill at once,
/// a power cut after [`RowMemo::sync`].
pub trait RowMemo: Send {
    /// The results that are there, in the order of `keys`. A row that failed is as one that was never computed.
    ///
    /// # Errors
    /// The memo cannot be read. A damaged result is no error: it is missing.
    fn look_up(&mut self, namespace: &str, keys: &[RowKey]) -> Result<Vec<Option<Vec<u8>>>, StageError>;

    /// Keeps results and failures. Of several results of one key any may be served: they are equal.
    ///
    /// # Errors
    /// Disk full, no permission. Nothing of this call may be taken as kept.
    fn append(&mut self, namespace: &str, results: &[(RowKey, &RowResult)]) -> Result<(), StageError>;

    /// Brings everything appended to the disk.
    ///
    /// # Errors
    /// As for `append`.
    fn sync(&mut self) -> Result<(), StageError> {
        Ok(())
    }

    /// Asks for the right to compute these rows; `false` where another process computes the row at this moment.
    /// Whoever is granted a row looks it up once more before computing it. Rights end with the process, and are
    /// advice: a memo that has none grants everything.
    ///
    /// # Errors
    /// The memo cannot be used.
    fn claim(&mut self, _namespace: &str, keys: &[RowKey]) -> Result<Vec<bool>, StageError> {
        Ok(vec![true; keys.len()])
    }

    /// Gives claims back, after the results were appended or when they will not be.
    ///
    /// # Errors
    /// The memo cannot be used.
    fn release(&mut self, _namespace: &str, _keys: &[RowKey]) -> Result<(), StageError> {
        Ok(())
    }
}

/// Keeps rows as long as the program runs. Clones share one memory, as processes share a store: what an attempt has
/// that was given no store, and a double for tests.
#[derive(Debug, Clone, Default)]
pub struct MemoryMemo {
    shared: Arc<Mutex<Memory>>,
    /// What this clone has claimed.
    mine: HashSet<(String, RowKey)>,
}

#[derive(Debug, Default)]
struct Memory {
    rows: HashMap<String, HashMap<RowKey, Vec<u8>>>,
    failures: HashMap<String, HashMap<RowKey, RowFailure>>,
    claims: HashSet<(String, RowKey)>,
    /// Rows ever appended.
    appended: usize,
}

impl MemoryMemo {
    /// How many results and failures were ever appended.
    pub fn appended(&self) -> usize {
        self.lock().appended
    }

    /// How many rows of a namespace are kept.
    pub fn len(&self, namespace: &str) -> usize {
        self.lock().rows.get(namespace).map_or(0, HashMap::len)
    }

    pub fn is_empty(&self, namespace: &str) -> bool {
        self.len(namespace) == 0
    }

    /// The error that a row failed with the last time.
    pub fn failure(&self, namespace: &str, key: &RowKey) -> Option<RowFailure> {
        self.lock().failures.get(namespace)?.get(key).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, Memory> {
        // Whole between calls, so a panic elsewhere does no harm.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl RowMemo for MemoryMemo {
    fn look_up(&mut self, namespace: &str, keys: &[RowKey]) -> Result<Vec<Option<Vec<u8>>>, StageError> {
        let memory = self.lock();
        let rows = memory.rows.get(namespace);
        Ok(keys.iter().map(|key| rows.and_then(|rows| rows.get(key)).cloned()).collect())
    }

    fn append(&mut self, namespace: &str, results: &[(RowKey, &RowResult)]) -> Result<(), StageError> {
        let mut memory = self.lock();
        memory.appended += results.len();
        for (key, result) in results {
            match result {
                Ok(bytes) => {
                    memory.rows.entry(namespace.to_owned()).or_default().insert(*key, bytes.clone());
                }
                Err(failure) => {
                    memory.failures.entry(namespace.to_owned()).or_default().insert(*key, failure.clone());
                }
            }
        }
        Ok(())
    }

    fn claim(&mut self, namespace: &str, keys: &[RowKey]) -> Result<Vec<bool>, StageError> {
        let mut granted = Vec::with_capacity(keys.len());
        for key in keys {
            let claim = (namespace.to_owned(), *key);
            let is_mine = self.mine.contains(&claim) || self.lock().claims.insert(claim.clone());
            if is_mine {
                self.mine.insert(claim);
            }
            granted.push(is_mine);
        }
        Ok(granted)
    }

    fn release(&mut self, namespace: &str, keys: &[RowKey]) -> Result<(), StageError> {
        for key in keys {
            let claim = (namespace.to_owned(), *key);
            if self.mine.remove(&claim) {
                self.lock().claims.remove(&claim);
            }
        }
        Ok(())
    }
}
