//! `${vars.NAME}`: variables may use variables; a value that is nothing but a reference keeps its type.

use std::collections::{HashMap, HashSet};

use serde_json::{Map, Value};

use super::{
    hint,
    mistake::{KeyPath, Mark, Mistake, below, path},
    template::{Piece, pieces, port_reference},
};

/// Longest chain of variables that use each other.
const MAX_CHAIN: usize = 50;
/// Most text that expansion may write in all.
const MAX_TEXT: usize = 64 << 20;

/// The variables, each resolved when first asked for.
pub(crate) struct Variables<'v> {
    written: &'v Map<String, Value>,
    resolved: HashMap<&'v str, Option<Value>>,
    chain: Vec<&'v str>,
    left: usize,
    pub mistakes: Vec<Mistake>,
    /// Places whose value could not be made out.
    pub poisoned: HashSet<KeyPath>,
}

/// Which references stay as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ports {
    /// `run` of a `command`: ports and escapes are for the executor.
    Keep,
    Refuse,
}

impl<'v> Variables<'v> {
    pub fn new(written: &'v Map<String, Value>) -> Self {
        Self {
            written,
            resolved: HashMap::new(),
            chain: Vec::new(),
            left: MAX_TEXT,
            mistakes: Vec::new(),
            poisoned: HashSet::new(),
        }
    }

    /// Resolves every variable, used or not, so that all mistakes show.
    pub fn check_all(&mut self) {
        for name in self.written.keys() {
            self.resolve(name);
        }
    }

    /// Replaces the references in a stage.
    pub fn expand_stage(&mut self, name: &str, stage: &mut Value) {
        let mut at = path(&["stages", name]);
        let is_command = stage.get("uses").and_then(Value::as_str) == Some("command");
        if is_command && let Some(run @ Value::String(_)) = stage.pointer_mut("/with/run") {
            let mut run_at = below(&at, &["with", "run"]);
            self.expand(run, &mut run_at, Ports::Keep);
            let expanded = run.take();
            self.expand(stage, &mut at, Ports::Refuse);
            if let Some(run) = stage.pointer_mut("/with/run") {
                *run = expanded;
            }
            return;
        }
        self.expand(stage, &mut at, Ports::Refuse);
    }

    fn expand(&mut self, value: &mut Value, at: &mut KeyPath, ports: Ports) {
        match value {
            Value::String(text) if text.contains("${") => match self.expand_text(text, at, ports) {
                Some(expanded) => *value = expanded,
                None => {
                    self.poisoned.insert(at.clone());
                }
            },
            Value::Array(list) => {
                for (i, element) in list.iter_mut().enumerate() {
                    at.push(i.to_string());
                    self.expand(element, at, ports);
                    at.pop();
                }
            }
            Value::Object(map) => {
                for (key, element) in map.iter_mut() {
                    at.push(key.clone());
                    self.expand(element, at, ports);
                    at.pop();
                }
            }
            _ => {}
        }
    }

    fn expand_text(&mut self, text: &str, at: &[String], ports: Ports) -> Option<Value> {
        // A reference and nothing else keeps its type.
        if let Some(only) = text.strip_prefix("${").and_then(|t| t.strip_suffix('}'))
            && !only.contains(['}', '{'])
            && (ports == Ports::Refuse || port_reference(only).is_none())
        {
            let value = self.look_up(only, at)?;
            if !self.spend(size(&value)) {
                self.mistakes.push(Mistake::value(at, TOO_MUCH));
                return None;
            }
            return Some(match value {
                Value::String(text) if ports == Ports::Keep => Value::String(text.replace("${", "$${")),
                value => value,
            });
        }
        let mut out = String::with_capacity(text.len() + 32);
        let mut whole = true;
        for piece in pieces(text) {
            match piece {
                Piece::Text(text) => out.push_str(text),
                Piece::Escaped if ports == Ports::Keep => out.push_str("$${"),
                Piece::Escaped => out.push_str("${"),
                Piece::Unclosed(text) => {
                    self.mistakes.push(
                        Mistake::new(at, Mark::Text(first_line(text)), "`${` without `}`")
                            .help("write `$${` for a dollar sign and a brace as they are"),
                    );
                    whole = false;
                }
                Piece::Reference(reference) if ports == Ports::Keep && port_reference(reference).is_some() => {
                    out.push_str("${");
                    out.push_str(reference);
                    out.push('}');
                }
                Piece::Reference(reference) => match self.look_up(reference, at) {
                    None => whole = false,
                    Some(Value::Array(_) | Value::Object(_)) => {
                        let needle = format!("${{{reference}}}");
                        self.mistakes.push(
                            Mistake::new(at, Mark::Text(needle), format!("`{reference}` is a list or a map"))
                                .help("it can stand alone as a value, but not inside text"),
                        );
                        whole = false;
                    }
                    Some(Value::String(text)) if ports == Ports::Keep => out.push_str(&text.replace("${", "$${")),
                    Some(Value::String(text)) => out.push_str(&text),
                    Some(scalar) => out.push_str(&scalar.to_string()),
                },
            }
            if out.len() > self.left {
                self.mistakes.push(Mistake::value(at, TOO_MUCH));
                return None;
            }
        }
        self.spend(out.len());
        whole.then_some(Value::String(out))
    }

    fn spend(&mut self, bytes: usize) -> bool {
        let left = self.left.checked_sub(bytes);
        self.left = left.unwrap_or(0);
        left.is_some()
    }

    fn look_up(&mut self, reference: &str, at: &[String]) -> Option<Value> {
        let needle = Mark::Text(format!("${{{reference}}}"));
        let mut keys = reference.trim().split('.');
        let head = keys.next().unwrap_or_default();
        if head != "vars" {
            let (message, help) = if port_reference(reference).is_some() {
                (
                    format!("`${{{reference}}}` has no meaning here"),
                    "ports are named only in `run` of a `command`".to_owned(),
                )
            } else {
                (
                    format!("unknown reference `${{{reference}}}`"),
                    if self.written.contains_key(head) {
                        format!("did you mean `${{vars.{head}}}`?")
                    } else {
                        format!("variables are `${{vars.NAME}}`; for the shell's own, write `$${{{reference}}}`")
                    },
                )
            };
            self.mistakes.push(Mistake::new(at, needle, message).help(help));
            return None;
        }
        let name = keys.next().unwrap_or_default();
        let Some((name, _)) = self.written.get_key_value(name) else {
            let help = hint::help(name, self.written.keys().map(String::as_str))
                .unwrap_or_else(|| format!("define it under `vars`, or with `--set vars.{name}=…`"));
            self.mistakes.push(Mistake::new(at, needle, format!("unknown variable `{name}`")).help(help));
            return None;
        };
        if self.chain.contains(&name.as_str()) {
            let mut circle = self.chain.clone();
            circle.push(name);
            self.mistakes.push(Mistake::new(at, needle, format!("variables use each other: {}", circle.join(" → "))));
            return None;
        }
        let mut value = self.resolve(name)?;
        for key in keys {
            let inner = match &value {
                Value::Object(map) => map.get(key),
                Value::Array(list) => key.parse::<usize>().ok().and_then(|i| list.get(i)),
                _ => None,
            };
            match inner {
                Some(inner) => value = inner.clone(),
                None => {
                    let known: Vec<&str> = value.as_object().into_iter().flatten().map(|(k, _)| k.as_str()).collect();
                    let help = hint::help(key, known);
                    self.mistakes
                        .push(Mistake::new(at, needle, format!("variable `{name}` has no `{key}`")).maybe_help(help));
                    return None;
                }
            }
        }
        if value.is_null() {
            let given = reference.trim();
            self.mistakes.push(
                Mistake::new(at, needle, format!("variable `{given}` has no value"))
                    .help(format!("give it one: `--set {given}=…`")),
            );
            return None;
        }
        Some(value)
    }

    fn resolve(&mut self, name: &'v str) -> Option<Value> {
        if let Some(done) = self.resolved.get(name) {
            return done.clone();
        }
        let at = path(&["vars", name]);
        if self.chain.len() >= MAX_CHAIN {
            self.mistakes
                .push(Mistake::value(&at, format!("more than {MAX_CHAIN} variables use each other in a chain")));
            return None;
        }
        let written = self.written.get(name)?;
        let before = self.mistakes.len();
        self.chain.push(name);
        let mut value = written.clone();
        self.expand(&mut value, &mut at.clone(), Ports::Refuse);
        self.chain.pop();
        let resolved = (self.mistakes.len() == before).then_some(value);
        self.resolved.insert(name, resolved.clone());
        resolved
    }
}

const TOO_MUCH: &str = "variables expand to too much text";

/// Roughly the bytes that a value takes.
fn size(value: &Value) -> usize {
    match value {
        Value::String(text) => 32 + text.len(),
        Value::Array(list) => 32 + list.iter().map(size).sum::<usize>(),
        Value::Object(map) => 32 + map.iter().map(|(k, v)| k.len() + size(v)).sum::<usize>(),
        _ => 32,
    }
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}
