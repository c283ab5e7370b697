//! Rows in one file, to take them to another store: the records of segments, with the name of each namespace before
//! its rows and a count at the end, so that a file that was cut short is known as such.

use std::io::{self, Read, Write};
use std::path::Path;

use crate::digest::Digest;
use crate::rows::RowStore;
use crate::rows::namespace::{Namespace, RowRef};
use crate::rows::record::{self, Kind, RECORD_HEADER, SEGMENT_HEADER};
use crate::{Result, StoreError};

/// Rows that are looked up or appended at a time.
const BATCH: usize = 1024;

/// What [`RowStore::import`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Imported {
    /// Results that were new.
    pub new: u64,
    /// Results that were there.
    pub known: u64,
}

impl RowStore {
    /// Writes all results of these namespaces, in the order of their keys; returns how many. Failures stay behind: they
    /// are of no use elsewhere. `name` is for messages.
    ///
    /// # Errors
    /// A namespace that is not there; what is read or written fails.
    pub fn export(&self, namespaces: &[String], out: &mut dyn Write, name: &Path) -> Result<u64> {
        let failed = || StoreError::while_doing("write", name);
        let there = self.namespaces()?;
        if let Some(unknown) = namespaces.iter().find(|wanted| !there.contains(wanted)) {
            return Err(StoreError::Unknown { what: "namespace of rows", name: unknown.clone() });
        }
        let none = Digest::from_bytes([0; 32]);
        let mut bytes = SEGMENT_HEADER.to_vec();
        let mut count = 0u64;
        for namespace in namespaces {
            record::encode(Kind::Namespace, &none, namespace.as_bytes(), &mut bytes);
            let mut rows = self.namespace(namespace)?;
            for keys in rows.keys(false)?.chunks(BATCH) {
                for (key, result) in keys.iter().zip(rows.look_up(keys)?) {
                    // One that is damaged is left out: it is computed again there as it would be here.
                    if let Some(result) = result {
                        record::encode(Kind::Result, key, &result, &mut bytes);
                        count += 1;
                    }
                }
                out.write_all(&bytes).map_err(failed())?;
                bytes.clear();
            }
        }
        record::encode(Kind::End, &none, &count.to_le_bytes(), &mut bytes);
        out.write_all(&bytes).and_then(|()| out.flush()).map_err(failed())?;
        Ok(count)
    }

    /// Takes in what [`RowStore::export`] wrote. `name` is for messages.
    ///
    /// # Errors
    /// A file that is damaged or cut short; the rows before that are taken in all the same.
    pub fn import(&self, from: &mut dyn Read, name: &Path) -> Result<Imported> {
        let mut start = Vec::new();
        let header = &mut from.take(SEGMENT_HEADER.len() as u64);
        header.read_to_end(&mut start).map_err(StoreError::while_doing("read", name))?;
        if start != SEGMENT_HEADER {
            return Err(StoreError::NotAnExport { path: name.to_owned() });
        }
        let mut taken = Intake { store: self, name, namespace: None, batch: Vec::new(), imported: Imported::default() };
        let mut count = 0u64;
        loop {
            let mut bytes = vec![0; RECORD_HEADER];
            read_all(from, &mut bytes, name).inspect_err(|_| taken.rescue())?;
            let bad = |what| StoreError::BadExport { path: name.to_owned(), what };
            let Some(header) = record::header(&bytes) else {
                taken.rescue();
                return Err(bad("a record is damaged"));
            };
            bytes.resize(header.record_bytes(), 0);
            read_all(from, &mut bytes[RECORD_HEADER..], name).inspect_err(|_| taken.rescue())?;
            let Some(payload) = record::payload(&bytes, &header) else {
                taken.rescue();
                return Err(bad("a record is damaged"));
            };
            match header.kind {
                Kind::Namespace => taken.begin(&String::from_utf8_lossy(payload))?,
                Kind::Result => {
                    count += 1;
                    taken.take(header.key, payload.to_vec())?;
                }
                Kind::Failure => {}
                Kind::End => {
                    taken.finish()?;
                    if payload != count.to_le_bytes() {
                        return Err(bad("rows are missing"));
                    }
                    return Ok(taken.imported);
                }
            }
        }
    }
}

/// The rows of an import on their way into the store.
struct Intake<'a> {
    store: &'a RowStore,
    /// The export, for messages.
    name: &'a Path,
    namespace: Option<Namespace>,
    batch: Vec<(Digest, Vec<u8>)>,
    imported: Imported,
}

impl Intake<'_> {
    fn begin(&mut self, name: &str) -> Result<()> {
        self.finish()?;
        self.namespace = Some(self.store.namespace(name)?);
        Ok(())
    }

    fn take(&mut self, key: Digest, result: Vec<u8>) -> Result<()> {
        self.batch.push((key, result));
        if self.batch.len() >= BATCH { self.append() } else { Ok(()) }
    }

    fn append(&mut self) -> Result<()> {
        let batch = std::mem::take(&mut self.batch);
        let Some(namespace) = &mut self.namespace else {
            let bad = || StoreError::BadExport { path: self.name.to_owned(), what: "rows of no namespace" };
            return if batch.is_empty() { Ok(()) } else { Err(bad()) };
        };
        let keys: Vec<Digest> = batch.iter().map(|(key, _)| *key).collect();
        let known = namespace.look_up(&keys)?;
        let new: Vec<_> = batch.iter().zip(&known).filter(|(_, known)| known.is_none()).map(|(row, _)| row).collect();
        namespace.append(new.iter().map(|(key, result)| (*key, RowRef::Result(result))))?;
        self.imported.new += new.len() as u64;
        self.imported.known += (batch.len() - new.len()) as u64;
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        self.append()?;
        if let Some(mut namespace) = self.namespace.take() {
            namespace.close_segment()?;
        }
        Ok(())
    }

    /// Keeps what came before an error, which is what the user should see.
    fn rescue(&mut self) {
        if let Err(error) = self.finish() {
            tracing::warn!(%error, "rows before the damage could not be kept");
        }
    }
}

fn read_all(from: &mut dyn Read, bytes: &mut [u8], name: &Path) -> Result<()> {
    from.read_exact(bytes).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => StoreError::BadExport { path: name.to_owned(), what: "it ends too early" },
        _ => StoreError::io("read", name, error),
    })
}
