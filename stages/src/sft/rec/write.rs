//! Putting samples together from parts that are rendered and escaped once an item.

use std::{fs, path::Path};

use rustc_hash::FxHashMap;

use super::{
    super::{
        rec_text::{self, Format, Place},
        samples::{ArrayWriter, Elements, escaped, push_fields, push_sample},
    },
    Params,
    users::{User, Users},
};
use crate::{
    StageError,
    artifact::{Id2Meta, TID_LENGTH, TidRecord, python_json},
    prompts::Prompts,
};

/// Users whose records are rendered at a time.
const CHUNK: usize = 256;

/// Each item as it stands in a file, by place in the catalogue.
pub struct Parts {
    /// At the beginning of a history.
    first: Vec<Vec<u8>>,
    later: Vec<Vec<u8>>,
    /// The id as a JSON string.
    ids: Vec<Vec<u8>>,
}

impl Parts {
    pub fn render(params: &Params, id2meta: &Id2Meta) -> Self {
        let all = |place: Place| -> Vec<Vec<u8>> {
            let mut text = String::new();
            let render = |record| {
                text.clear();
                match params.format {
                    Format::Text => rec_text::push_text(&mut text, record, place, params.compat),
                    Format::Compact => rec_text::push_compact(&mut text, record),
                }
                escaped(&text)
            };
            id2meta.records().iter().map(render).collect()
        };
        let id = |record: &TidRecord| {
            let mut out = Vec::new();
            python_json::write_string(&mut out, record.id().as_str());
            out
        };
        let ids = || id2meta.records().iter().map(id).collect();
        let (first, (later, ids)) = rayon::join(|| all(Place::First), || rayon::join(|| all(Place::Later), ids));
        Self { first, later, ids }
    }

    fn input(&self, items: &[usize]) -> &[u8] {
        items.first().map_or(&[], |&i| &self.first[i])
    }

    fn output<'a>(&'a self, items: &'a [usize]) -> impl Iterator<Item = &'a [u8]> {
        items.iter().skip(1).map(|&i| &*self.later[i])
    }
}

/// Writes the training samples, and says how many there are.
///
/// # Errors
/// The file cannot be written.
pub fn samples(
    params: &Params,
    path: &Path,
    prompts: &Prompts,
    users: &Users<'_>,
    parts: &Parts,
) -> Result<u64, StageError> {
    let instruction = escaped(&prompts.sft_rec.instruction);
    let mut writer = ArrayWriter::create(path)?;
    for user in &users.kept {
        let items = user.sample(params.with_valid);
        let (input, output) = (parts.input(items), parts.output(items));
        match params.format {
            Format::Compact => writer.push(|out| push_sample(out, b"", [], [input].into_iter().chain(output)))?,
            Format::Text if items.len() < 2 && !params.compat.is_reference() => {}
            Format::Text => writer.push(|out| push_sample(out, &instruction, [input], output))?,
        }
    }
    writer.finish()
}

/// Writes every sample with its ids, words and whole target records.
///
/// # Errors
/// The file cannot be written.
pub fn records(
    path: &Path,
    prompts: &Prompts,
    users: &Users<'_>,
    id2meta: &Id2Meta,
    parts: &Parts,
) -> Result<(), StageError> {
    let instruction = escaped(&prompts.sft_rec.instruction);
    let mut writer = ArrayWriter::create(path)?;
    // Rendered once an item, at the nesting at which they are copied.
    let mut whole = Vec::with_capacity(id2meta.len());
    let mut words = Vec::with_capacity(id2meta.len());
    for record in id2meta.records() {
        let mut out = Vec::new();
        record.fields().write_pretty(&mut out, 2);
        whole.push(out);
        let mut out = Vec::new();
        for (i, word) in record.clean_words().enumerate() {
            if i > 0 {
                out.push(b',');
            }
            python_json::write_break(&mut out, 3);
            python_json::write_string(&mut out, word);
        }
        words.push(out);
    }
    let name = |what: &str| -> Vec<u8> {
        let mut out = Vec::new();
        push_name(&mut out, what);
        out
    };
    let [metadata, id_list, id_len, all_words] =
        ["metadata", "item_id_list", "item_id_len", "all_summary_words"].map(name);
    let truths =
        ["id", "tid", "msg"].map(|what| ["valid", "test"].map(|split| name(&format!("{split}_ground_truth_{what}"))));
    let render = |out: &mut Vec<u8>, user: &User<'_>| {
        out.push(b'{');
        push_fields(out, &instruction, [parts.input(user.history())], parts.output(user.history()));
        out.push(b',');
        out.extend_from_slice(&metadata);
        push_metadata(out, user);
        out.push(b',');
        out.extend_from_slice(&id_list);
        push_array(out, user.items.iter().map(|&i| &*parts.ids[i]), true);
        out.push(b',');
        out.extend_from_slice(&id_len);
        push_number(out, user.items.len());
        out.push(b',');
        out.extend_from_slice(&all_words);
        push_array(out, user.items.iter().map(|&i| &*words[i]), false);
        let targets = [user.valid(), user.test()];
        let [as_id, as_tid, as_record] = &truths;
        for (name, item) in as_id.iter().zip(targets) {
            push_truth(out, name, |out| out.extend_from_slice(&parts.ids[item]));
        }
        for (name, item) in as_tid.iter().zip(targets) {
            push_truth(out, name, |out| push_array(out, [&*words[item]], false));
        }
        for (name, item) in as_record.iter().zip(targets) {
            push_truth(out, name, |out| out.extend_from_slice(&whole[item]));
        }
        python_json::write_break(out, 1);
        out.push(b'}');
    };
    // A chunk is written while the next is rendered.
    let mut ready = Elements::default();
    for chunk in users.kept.chunks(CHUNK) {
        let render_next = || {
            let mut elements = Elements::default();
            chunk.iter().for_each(|user| elements.push(|out| render(out, user)));
            elements
        };
        let (written, next) = rayon::join(|| writer.append(ready), render_next);
        written?;
        ready = next;
    }
    writer.append(ready)?;
    writer.finish().map(|_| ())
}

fn push_truth(out: &mut Vec<u8>, name: &[u8], push: impl FnOnce(&mut Vec<u8>)) {
    out.push(b',');
    out.extend_from_slice(name);
    push(out);
}

fn push_number(out: &mut Vec<u8>, number: usize) {
    out.extend_from_slice(number.to_string().as_bytes());
}

/// Writes the held-out targets, with each user's group by length of history and the domain of the test item: a line of
/// [`Holdout`](crate::artifact::Holdout) each.
///
/// # Errors
/// The file cannot be written.
pub fn holdout(path: &Path, users: &Users<'_>, id2meta: &Id2Meta, parts: &Parts) -> Result<(), StageError> {
    let groups = users.groups();
    let mut out = Vec::new();
    for user in &users.kept {
        out.extend_from_slice(b"{\"user\":");
        python_json::write_string(&mut out, user.name);
        out.extend_from_slice(b",\"history\":[");
        for (i, &item) in user.history().iter().enumerate() {
            out.extend_from_slice(if i > 0 { b"," } else { b"" });
            out.extend_from_slice(&parts.ids[item]);
        }
        out.extend_from_slice(b"],\"valid\":");
        out.extend_from_slice(&parts.ids[user.valid()]);
        out.extend_from_slice(b",\"test\":");
        out.extend_from_slice(&parts.ids[user.test()]);
        let domain = id2meta.records()[user.test()].domain();
        for (name, text) in [("group", groups.name(user.history_length)), ("domain", domain.as_deref())] {
            if let Some(text) = text {
                out.extend_from_slice(format!(",\"{name}\":").as_bytes());
                python_json::write_string(&mut out, text);
            }
        }
        out.extend_from_slice(b"}\n");
    }
    fs::write(path, out).map_err(|e| StageError::io("write", path, e))
}

fn push_name(out: &mut Vec<u8>, name: &str) {
    python_json::write_break(out, 2);
    python_json::write_string(out, name);
    out.extend_from_slice(b": ");
}

/// An array at nesting level 2 of parts that hold one element or several; `breaks` if they come without line breaks.
fn push_array<'a>(out: &mut Vec<u8>, parts: impl IntoIterator<Item = &'a [u8]>, breaks: bool) {
    out.push(b'[');
    for (i, part) in parts.into_iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        if breaks {
            python_json::write_break(out, 3);
        }
        out.extend_from_slice(part);
    }
    python_json::write_break(out, 2);
    out.push(b']');
}

fn push_metadata(out: &mut Vec<u8>, user: &User<'_>) {
    let items = user.items.len();
    // Words of the answer, with the two targets cut off; the total counts those and the first item's.
    let output_words = (items - 3) * TID_LENGTH;
    out.push(b'{');
    python_json::write_break(out, 3);
    out.extend_from_slice(b"\"user_id\": ");
    python_json::write_string(out, user.name);
    for (name, value) in [
        ("total_items", items),
        ("total_words", output_words + TID_LENGTH),
        ("input_word_count", TID_LENGTH),
        ("output_word_count", output_words),
    ] {
        out.push(b',');
        python_json::write_break(out, 3);
        python_json::write_string(out, name);
        out.extend_from_slice(b": ");
        push_number(out, value);
    }
    python_json::write_break(out, 2);
    out.push(b'}');
}

/// Writes the words of each of `items`.
///
/// # Errors
/// The file cannot be written.
pub fn item_id2tid(path: &Path, id2meta: &Id2Meta, items: &[usize]) -> Result<(), StageError> {
    write_map(
        path,
        items.iter().map(|&i| {
            let record = &id2meta.records()[i];
            (record.id().as_str(), record.clean_words().collect())
        }),
    )
}

/// Writes the items of each TID, both in the order of `items`.
///
/// # Errors
/// The file cannot be written.
pub fn tid2item_id(path: &Path, id2meta: &Id2Meta, items: &[usize]) -> Result<(), StageError> {
    let mut places: FxHashMap<String, usize> = FxHashMap::default();
    let mut tids: Vec<(String, Vec<&str>)> = Vec::new();
    for &i in items {
        let record = &id2meta.records()[i];
        let place = *places.entry(record.tid_key()).or_insert_with_key(|key| {
            tids.push((key.clone(), Vec::new()));
            tids.len() - 1
        });
        tids[place].1.push(record.id().as_str());
    }
    write_map(path, tids.iter().map(|(key, ids)| (&**key, ids.clone())))
}

fn write_map<'a>(path: &Path, entries: impl Iterator<Item = (&'a str, Vec<&'a str>)>) -> Result<(), StageError> {
    let mut out = Vec::new();
    for (i, (key, strings)) in entries.enumerate() {
        out.push(if i == 0 { b'{' } else { b',' });
        python_json::write_break(&mut out, 1);
        python_json::write_string(&mut out, key);
        out.extend_from_slice(b": ");
        python_json::write_strings(&mut out, &strings, 1);
    }
    if out.is_empty() {
        out.push(b'{');
    } else {
        python_json::write_break(&mut out, 0);
    }
    out.push(b'}');
    fs::write(path, out).map_err(|e| StageError::io("write", path, e))
}
