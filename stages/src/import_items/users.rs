//! Reading users' sequences, or interactions to make them from, and keeping what the catalogue knows.

use std::path::Path;

use rustc_hash::{FxHashMap, FxHashSet};
use serde_json::{Map, Value};

use super::{Params, report::Account, table};
use crate::{
    StageError,
    artifact::{items, sequences, text},
};

const USER_FIELDS: [&str; 6] = ["user", "user_id", "userId", "reviewerID", "uid", "customer_id"];
const ITEM_FIELDS: [&str; 7] = ["item", "item_id", "itemId", "asin", "parent_asin", "product_id", "iid"];
const TIME_FIELDS: [&str; 6] = ["timestamp", "time", "unixReviewTime", "date", "ts", "created_at"];

/// A user as found in the file.
struct User {
    name: String,
    line: u64,
    items: Vec<String>,
}

/// An interaction as it stands: its line, and its fields or what is wrong with it.
type Interaction = (u64, Result<Map<String, Value>, String>);

/// Reads the sequences and gives them as the text of a `sequences` artifact; what is dropped goes to `account`.
///
/// # Errors
/// The file cannot be read as a whole, no user can be used, or something was dropped in strict mode.
pub fn read(
    params: &Params,
    path: &Path,
    known: &FxHashSet<&str>,
    account: &mut Account,
) -> Result<String, StageError> {
    let text = text::read(path)?;
    let users = match interactions(path, &text, account)? {
        Some(users) => users,
        None => plain(&text, account)?,
    };
    account.read = users.len() as u64;
    let mut out = String::new();
    for user in users {
        let mut items = Vec::with_capacity(user.items.len());
        for item in &user.items {
            if known.contains(item.as_str()) {
                items.push(item.as_str());
            } else {
                account.drop("unknown_item", Some(user.line), &format!("item `{item}` of user `{}`", user.name))?;
            }
        }
        if items.len() < params.min_items {
            let example = format!("user `{}` with {} items", user.name, items.len());
            account.drop("too_short_user", Some(user.line), &example)?;
            continue;
        }
        account.kept += 1;
        out.push_str(&user.name);
        for item in items {
            out.push(' ');
            out.push_str(item);
        }
        out.push('\n');
    }
    if account.kept == 0 {
        let reasons = account.lines("sequences").join("; ");
        let message =
            if account.read == 0 { "holds no sequence".into() } else { format!("no user can be used ({reasons})") };
        return Err(StageError::input(path, message).help(
            "one user a line (`user item item …`) or interactions with user, item and time; ids as in the catalogue",
        ));
    }
    Ok(out)
}

/// `user item item …` a line; the lines of one user are joined in the file's order.
fn plain(text: &str, account: &mut Account) -> Result<Vec<User>, StageError> {
    let mut users: Vec<User> = Vec::new();
    let mut places: FxHashMap<&str, usize> = FxHashMap::default();
    for line in sequences::lines(text) {
        let items = line.items().map(str::to_owned);
        match places.get(line.head) {
            Some(&place) => {
                account.mend("user_on_several_lines", &format!("line {}: user `{}`", line.number, line.head));
                users[place].items.extend(items);
            }
            None => {
                places.insert(line.head, users.len());
                users.push(User { name: line.head.to_owned(), line: line.number, items: items.collect() });
            }
        }
    }
    Ok(users)
}

/// One interaction a line, as JSON Lines or a table with a header; `None` if the file is neither.
fn interactions(path: &Path, text: &str, account: &mut Account) -> Result<Option<Vec<User>>, StageError> {
    let first = text.trim_start_matches('\u{feff}').lines().next().unwrap_or_default();
    let cells: Vec<&str> = first.split([',', '\t']).map(|c| c.trim().trim_matches('"')).collect();
    let records: Vec<Interaction> = if first.trim_start().starts_with('{') {
        text.split('\n')
            .zip(1u64..)
            .filter(|(l, _)| !l.trim().is_empty())
            .map(|(line, number)| (number, serde_json::from_str(line).map_err(|e| format!("not valid JSON: {e}"))))
            .collect()
    } else if cells.len() > 1
        && cells.iter().any(|c| USER_FIELDS.contains(c))
        && cells.iter().any(|c| ITEM_FIELDS.contains(c))
    {
        let table = table::read(text).map_err(|(line, m)| StageError::input_at(path, line, m))?;
        let record =
            |cells: Vec<String>| table.header.iter().cloned().zip(cells.into_iter().map(Value::String)).collect();
        table.rows.into_iter().map(|(line, cells)| (line, Ok(record(cells)))).collect()
    } else {
        return Ok(None);
    };
    Ok(Some(group(records, account)?))
}

fn group(records: Vec<Interaction>, account: &mut Account) -> Result<Vec<User>, StageError> {
    struct Visit {
        time: Time,
        item: String,
    }
    let mut users: Vec<(String, u64, Vec<Visit>)> = Vec::new();
    let mut places: FxHashMap<String, usize> = FxHashMap::default();
    for (line, record) in records {
        let pair = record.and_then(|record| {
            let find = |names: &[&str]| names.iter().find_map(|name| record.get(*name));
            let user = find(&USER_FIELDS).ok_or("an interaction without a user")?;
            let item = find(&ITEM_FIELDS).ok_or("an interaction without an item")?;
            Ok((items::id_from(user)?.0, items::id_from(item)?.0, Time::of(find(&TIME_FIELDS))))
        });
        match pair {
            Ok((user, item, time)) => {
                let place = *places.entry(user).or_insert_with_key(|user| {
                    users.push((user.clone(), line, Vec::new()));
                    users.len() - 1
                });
                users[place].2.push(Visit { time, item });
            }
            Err(message) => account.drop("not_an_interaction", Some(line), &message)?,
        }
    }
    let sorted = users.into_iter().map(|(name, line, mut visits)| {
        // Stable: what has the same time, or none, keeps the file's order.
        visits.sort_by(|a, b| a.time.compare(&b.time));
        User { name, line, items: visits.into_iter().map(|v| v.item).collect() }
    });
    Ok(sorted.collect())
}

/// When an interaction was: a number where it is one, else a text that sorts (ISO 8601).
enum Time {
    None,
    Number(f64),
    Text(String),
}

impl Time {
    fn of(value: Option<&Value>) -> Self {
        match value {
            Some(Value::Number(n)) => n.as_f64().map_or(Self::None, Self::Number),
            Some(Value::String(s)) => match s.trim().parse() {
                Ok(number) => Self::Number(number),
                Err(_) => Self::Text(s.trim().to_owned()),
            },
            _ => Self::None,
        }
    }

    fn compare(&self, other: &Self) -> std::cmp::Ordering {
        match (self, other) {
            (Self::Number(a), Self::Number(b)) => a.total_cmp(b),
            (Self::Text(a), Self::Text(b)) => a.cmp(b),
            (a, b) => a.rank().cmp(&b.rank()),
        }
    }

    fn rank(&self) -> u8 {
        match self {
            Self::None => 0,
            Self::Number(_) => 1,
            Self::Text(_) => 2,
        }
    }
}
