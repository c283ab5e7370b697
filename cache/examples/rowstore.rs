//! Measures the store of rows: a million small ones appended, looked up, opened, merged; and sled beside it as an index.
//! `rowstore FOLDER [ROWS]` prints one JSON object. The folder must not exist.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use grlm_cache::rows::{RowRef, RowStore};
use grlm_cache::{Access, Digest};

/// Bytes of a result: five words and their punctuation.
const PAYLOAD: usize = 64;
const PIECE: usize = 1000;

fn key(n: usize) -> Digest {
    Digest::of(&(n as u64).to_le_bytes())
}

fn size(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    let of = |path: PathBuf| if path.is_dir() { size(&path) } else { fs::metadata(path).map_or(0, |m| m.len()) };
    entries.flatten().map(|entry| of(entry.path())).sum()
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = PathBuf::from(arguments.next().ok_or("usage: rowstore FOLDER [ROWS]")?);
    let rows: usize = arguments.next().map_or(Ok(1_000_000), |n| n.parse())?;
    fs::create_dir(&folder)?;
    let store = RowStore::at(&folder.join("rows"), Access::Write);
    let mut figures = BTreeMap::new();
    let keys: Vec<Digest> = (0..rows).map(key).collect();
    // In the order of an attempt, which is not that of the keys.
    let payload = |n: usize| format!("{n:0>PAYLOAD$}").into_bytes();

    let began = Instant::now();
    let mut namespace = store.namespace("bench")?;
    for (piece, keys) in keys.chunks(PIECE).enumerate() {
        let results: Vec<Vec<u8>> = (0..keys.len()).map(|i| payload(piece * PIECE + i)).collect();
        namespace.append(keys.iter().zip(&results).map(|(key, result)| (*key, RowRef::Result(result))))?;
    }
    namespace.close_segment()?;
    drop(namespace);
    figures.insert("append_rows_per_s", rows as f64 / began.elapsed().as_secs_f64());
    figures.insert("bytes", size(&folder) as f64);
    figures.insert("payload", (rows * PAYLOAD) as f64);

    let began = Instant::now();
    let mut namespace = store.namespace("bench")?;
    figures.insert("open_s", began.elapsed().as_secs_f64());

    let began = Instant::now();
    let found = namespace.look_up(&keys)?;
    figures.insert("look_up_keys_per_s", rows as f64 / began.elapsed().as_secs_f64());
    assert!(found.iter().enumerate().all(|(n, result)| result.as_deref() == Some(&payload(n)[..])));
    drop(found);
    let began = Instant::now();
    for keys in keys.chunks(256) {
        assert!(namespace.look_up(keys)?.iter().all(Option::is_some));
    }
    figures.insert("look_up_256_keys_per_s", rows as f64 / began.elapsed().as_secs_f64());
    let unknown: Vec<Digest> = (rows..2 * rows).map(key).collect();
    let began = Instant::now();
    assert!(namespace.look_up(&unknown)?.iter().all(Option::is_none));
    figures.insert("look_up_unknown_keys_per_s", rows as f64 / began.elapsed().as_secs_f64());
    drop(namespace);

    fs::remove_dir_all(folder.join("index"))?;
    let began = Instant::now();
    let mut namespace = store.namespace("bench")?;
    assert!(namespace.look_up(&keys[..1])?[0].is_some());
    figures.insert("open_without_index_s", began.elapsed().as_secs_f64());
    drop(namespace);

    let segments = 200;
    for n in 0..segments {
        let results: Vec<(Digest, Vec<u8>)> = (0..rows / 1000).map(|i| (key(n * rows + i), payload(i))).collect();
        let mut namespace = store.namespace("small")?;
        namespace.append(results.iter().map(|(key, result)| (*key, RowRef::Result(result))))?;
        namespace.close_segment()?;
    }
    let began = Instant::now();
    assert_eq!(store.namespace("small")?.compact()?, segments);
    figures.insert("merge_200_segments_s", began.elapsed().as_secs_f64());

    let path = folder.join("sled");
    let began = Instant::now();
    let database = sled::Config::new().path(&path).cache_capacity(256 << 20).flush_every_ms(None).open()?;
    for (n, key) in keys.iter().enumerate() {
        database.insert(key.as_bytes(), &(n as u64).to_le_bytes())?;
    }
    database.flush()?;
    figures.insert("sled_insert_rows_per_s", rows as f64 / began.elapsed().as_secs_f64());
    drop(database);
    figures.insert("sled_bytes", size(&path) as f64);
    let began = Instant::now();
    let database = sled::Config::new().path(&path).cache_capacity(256 << 20).flush_every_ms(None).open()?;
    figures.insert("sled_open_s", began.elapsed().as_secs_f64());
    let began = Instant::now();
    for key in &keys {
        assert!(database.get(key.as_bytes())?.is_some());
    }
    figures.insert("sled_get_keys_per_s", rows as f64 / began.elapsed().as_secs_f64());
    println!("{}", serde_json::to_string(&figures)?);
    Ok(())
}
