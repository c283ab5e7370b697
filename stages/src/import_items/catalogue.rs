//! Reading a catalogue in any form, record by record, and keeping what can be used.

use std::{collections::BTreeMap, path::Path};

use rustc_hash::FxHashSet;
use serde_json::{Map, Value};

use super::{Params, clean, report::Account, table};
use crate::{
    StageError,
    artifact::{
        Item, ItemId,
        items::{self, Form},
        text,
    },
};

/// Names under which catalogues keep the id, in the order in which they are looked for.
const ID_FIELDS: [&str; 7] = ["id", "item_id", "asin", "parent_asin", "product_id", "itemId", "sku"];

/// Characters of a value or of a field's name that an error shows.
const SHOWN: usize = 60;

/// A record as it stands: its line, its key in an object of records, and its fields or what is wrong with it.
struct Raw {
    line: Option<u64>,
    key: Option<String>,
    fields: Result<Map<String, Value>, String>,
}

/// Reads the catalogue; what is dropped goes to `account`.
///
/// # Errors
/// The file cannot be read as a whole, nothing in it can be used, or something was dropped in strict mode.
pub fn read(params: &Params, path: &Path, account: &mut Account) -> Result<Vec<Item>, StageError> {
    let text = text::read(path)?;
    let mut kept: Vec<Item> = Vec::new();
    let mut seen = FxHashSet::default();
    for raw in raw_records(path, &text)? {
        account.read += 1;
        let mut fields = match raw.fields {
            Ok(fields) => fields,
            Err(message) => {
                account.drop("not_a_record", raw.line, &message)?;
                continue;
            }
        };
        rename(&mut fields, &params.rename);
        let id = match take_id(params, raw.key, &mut fields) {
            Ok(id) => id,
            Err(message) => {
                account.drop("no_usable_id", raw.line, &message)?;
                continue;
            }
        };
        if !seen.insert(id.clone()) {
            account.drop("repeated_id", raw.line, &format!("item `{id}`"))?;
            continue;
        }
        let mended = clean::clean(&mut fields);
        for (reason, yes) in [("html", mended.markup), ("lists_written_as_text", mended.list)] {
            if yes {
                account.mend(reason, &format!("item `{id}`"));
            }
        }
        let item = Item { id, fields };
        if params.require_text && item.title().is_none() && item.description().is_none() && item.categories().is_none()
        {
            account.drop("no_text", raw.line, &format!("item `{}`", item.id))?;
            continue;
        }
        kept.push(item);
    }
    account.kept = kept.len() as u64;
    if kept.is_empty() {
        let reasons = account.lines("items").join("; ");
        let message =
            if account.read == 0 { "holds no record".into() } else { format!("no item can be used ({reasons})") };
        return Err(StageError::input(path, message).help(
            "a catalogue is JSON Lines, a JSON object or array, or CSV, with `id` and `title` or `description`",
        ));
    }
    Ok(kept)
}

fn raw_records(path: &Path, text: &str) -> Result<Vec<Raw>, StageError> {
    let start = text.trim_start_matches('\u{feff}').trim_start();
    if start.is_empty() {
        return Err(StageError::input(path, "the file is empty"));
    }
    let object = |value: Value| match value {
        Value::Object(fields) => Ok(fields),
        other => Err(format!("{} is not an object of fields", text::beginning(&other.to_string(), SHOWN))),
    };
    if !start.starts_with(['{', '[']) {
        let table = table::read(start).map_err(|(line, m)| StageError::input_at(path, line, m))?;
        if table.header.len() < 2 {
            return Err(StageError::input_at(path, 1, "neither JSON nor a table with a header"));
        }
        let record =
            |cells: Vec<String>| table.header.iter().cloned().zip(cells.into_iter().map(Value::String)).collect();
        return Ok(table
            .rows
            .into_iter()
            .map(|(line, cells)| Raw { line: Some(line), key: None, fields: Ok(record(cells)) })
            .collect());
    }
    Ok(match items::form(start) {
        Form::Lines => text
            .split('\n')
            .zip(1u64..)
            .filter(|(l, _)| !l.trim().is_empty())
            .map(|(line, number)| Raw {
                line: Some(number),
                key: None,
                fields: serde_json::from_str(line).map_err(|e| format!("not valid JSON: {e}")).and_then(object),
            })
            .collect(),
        Form::Object => {
            let records: Map<String, Value> = serde_json::from_str(start)
                .map_err(|e| text::json_error(path, &e, "a catalogue (object id → fields)"))?;
            records.into_iter().map(|(key, v)| Raw { line: None, key: Some(key), fields: object(v) }).collect()
        }
        Form::Array => {
            let records: Vec<Value> = serde_json::from_str(start)
                .map_err(|e| text::json_error(path, &e, "a catalogue (array of objects)"))?;
            records.into_iter().map(|v| Raw { line: None, key: None, fields: object(v) }).collect()
        }
    })
}

fn rename(fields: &mut Map<String, Value>, names: &BTreeMap<String, String>) {
    for (from, to) in names {
        if let Some(value) = fields.shift_remove(from) {
            fields.insert(to.clone(), value);
        }
    }
}

/// The record's id, taken out of its fields: the key it stands under, else the named or first known id field.
fn take_id(params: &Params, key: Option<String>, fields: &mut Map<String, Value>) -> Result<ItemId, String> {
    if let Some(key) = key {
        fields.shift_remove("id");
        return items::id_from(&Value::String(key));
    }
    let name = match &params.id_field {
        Some(name) => fields.contains_key(name).then_some(name.as_str()),
        None => ID_FIELDS.into_iter().find(|name| fields.contains_key(*name)),
    };
    let value = name.and_then(|name| fields.shift_remove(name));
    // An `id` that is not the one asked for must not stand beside it.
    fields.shift_remove("id");
    let value = value.ok_or_else(|| format!("a record with the fields {}", field_names(fields)))?;
    items::id_from(&value)
}

fn field_names(fields: &Map<String, Value>) -> String {
    let names: Vec<String> = fields.keys().take(8).map(|name| format!("`{}`", text::beginning(name, SHOWN))).collect();
    names.join(", ")
}
