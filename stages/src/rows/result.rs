//! What a job returns: a result or a failure for each row, in their order.

use super::{RowFailure, RowResult};

/// The results of a job. Rows of equal key share one.
#[derive(Debug, Clone)]
pub struct Rows {
    /// By distinct key.
    pub(super) results: Vec<RowResult>,
    /// Row → index into `results`.
    pub(super) of_row: Vec<u32>,
    pub(super) known: usize,
    pub(super) computed: usize,
}

impl Rows {
    pub fn len(&self) -> usize {
        self.of_row.len()
    }

    pub fn is_empty(&self) -> bool {
        self.of_row.is_empty()
    }

    /// The result of a row, counted from 0.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn get(&self, row: usize) -> Result<&[u8], &RowFailure> {
        self.results[self.of_row[row] as usize].as_deref()
    }

    /// All rows in their order.
    pub fn iter(&self) -> impl Iterator<Item = Result<&[u8], &RowFailure>> {
        (0..self.len()).map(|row| self.get(row))
    }

    /// The rows that failed.
    pub fn failures(&self) -> impl Iterator<Item = (usize, &RowFailure)> {
        (0..self.len()).filter_map(|row| Some((row, self.get(row).err()?)))
    }

    /// Distinct rows whose results were there, or were computed meanwhile by another process.
    pub fn known(&self) -> usize {
        self.known
    }

    /// Distinct rows that this attempt computed, failed ones included.
    pub fn computed(&self) -> usize {
        self.computed
    }
}
