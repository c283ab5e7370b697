//! Chat templates as Hugging Face folders carry them: Jinja, rendered as transformers renders it.
//!
//! transformers gives templates the functions `raise_exception` and `strftime_now`, a `tojson` that escapes nothing,
//! Python's methods of strings, and the marks `generation` … `endgeneration`. `strftime_now` is left out here, so that
//! a prompt does not depend on the day: templates that know it have a date to fall back to.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use minijinja::{Environment, ErrorKind as Kind, Value, value::Kwargs};
use serde::Serialize;
use serde_json::{Map, Value as Json};

use crate::Error;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    pub role: Role,
    pub content: String,
}

/// Whose turn it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    System,
    User,
    Assistant,
}

impl Message {
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: Role::User, content: content.into() }
    }

    pub fn assistant(content: impl Into<String>) -> Self {
        Self { role: Role::Assistant, content: content.into() }
    }
}

/// A chat template, ready to render.
pub struct ChatTemplate {
    /// The file that it stands in.
    file: PathBuf,
    environment: Environment<'static>,
    /// `bos_token`, `eos_token` and the like.
    special: Map<String, Json>,
}

const NAME: &str = "chat_template";
/// What [`ChatTemplate::check`] lets a user say: a word that stands in no template.
const PROBE: &str = "zqxgrlmprobe";

/// Special tokens that templates name.
const SPECIAL: [&str; 7] =
    ["bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "additional_special_tokens"];

impl ChatTemplate {
    /// Reads `chat_template.jinja`, or the template in `tokenizer_config.json`.
    ///
    /// # Errors
    /// There is none, or it is not a template.
    pub fn load(folder: &Path) -> Result<Self, Error> {
        let path = folder.join("tokenizer_config.json");
        let config: Map<String, Json> = match read(&path)? {
            Some(text) => serde_json::from_str(&text)
                .map_err(|e| Error::model(&path, format!("not a tokenizer's settings: {e}")).help("copy it again"))?,
            None => Map::new(),
        };
        let own = folder.join("chat_template.jinja");
        let (file, text) = match read(&own)? {
            Some(text) => (own, text),
            None => (
                path,
                config.get("chat_template").and_then(named_default).ok_or_else(|| {
                    Error::model(folder, "has no chat template").help(
                        "a base model has none; take the instruction-tuned one, or put a `chat_template.jinja` into the folder",
                    )
                })?,
            ),
        };
        let special = SPECIAL.iter().filter_map(|name| Some(((*name).to_owned(), content(config.get(*name)?)?)));
        Self::new(file, &text, special.collect())
    }

    fn new(file: PathBuf, text: &str, special: Map<String, Json>) -> Result<Self, Error> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(Kind::InvalidOperation, message))
        });
        environment.add_filter("tojson", to_json);
        environment
            .add_template_owned(NAME, without_generation_marks(text))
            .map_err(|e| Error::model(&file, format!("its chat template is not one: {e}")).help(MEND))?;
        Ok(Self { file, environment, special })
    }

    /// Whether it takes a conversation that begins as all do here: with a user's turn, and no system prompt.
    ///
    /// # Errors
    /// It refuses that, or leaves out what the user says: whatever the conversations, there would be no answers.
    pub fn check(&self, settings: &Map<String, Json>) -> Result<(), Error> {
        let wrong = |message: String| Error::model(&self.file, message).help(MEND);
        let text = self
            .rendered(&[Message::user(PROBE)], settings)
            .map_err(|e| wrong(format!("the chat template refuses every conversation: {e}")))?;
        match text.to_lowercase().contains(PROBE) {
            true => Ok(()),
            false if text.trim().is_empty() => Err(wrong("the chat template renders nothing".to_owned())),
            false => Err(wrong("the chat template leaves out what the user says".to_owned())),
        }
    }

    /// The text of a conversation, up to where the assistant's next turn begins. `settings` are further variables,
    /// such as Qwen3's `enable_thinking`.
    ///
    /// # Errors
    /// The template refuses the conversation.
    pub fn render(&self, messages: &[Message], settings: &Map<String, Json>) -> Result<String, Error> {
        self.rendered(messages, settings).map_err(|e| {
            Error::argument(format!("the chat template refuses the conversation: {e}"))
                .help("mend the template in a copy of the folder, or take another model")
        })
    }

    fn rendered(&self, messages: &[Message], settings: &Map<String, Json>) -> Result<String, minijinja::Error> {
        let mut context = self.special.clone();
        context.extend(settings.clone());
        context.insert("messages".into(), serde_json::to_value(messages).unwrap_or_default());
        context.insert("add_generation_prompt".into(), Json::Bool(true));
        self.environment.get_template(NAME)?.render(Value::from_serialize(&context))
    }
}

const MEND: &str = "conversations begin with the user's turn and have no system prompt: mend the template in a copy of the \
                    folder, or take another model";

fn read(path: &Path) -> Result<Option<String>, Error> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io("read", path, e)),
    }
}

/// The template, or of several the one called `default`.
fn named_default(value: &Json) -> Option<String> {
    if let Some(text) = value.as_str() {
        return Some(text.to_owned());
    }
    let default = value.as_array()?.iter().find(|one| one["name"] == "default")?;
    default["template"].as_str().map(str::to_owned)
}

/// A special token is written as its text, or as an object around it.
fn content(value: &Json) -> Option<Json> {
    match value {
        Json::Null => None,
        Json::Object(object) => object.get("content").cloned(),
        other => Some(other.clone()),
    }
}

/// Marks for training around what the assistant says: blocks that do nothing.
fn without_generation_marks(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(open) = rest.find("{%") {
        let Some(end) = rest[open..].find("%}").map(|end| open + end) else { break };
        let inside = &rest[open + 2..end];
        let word = inside.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        out.push_str(&rest[..open + 2]);
        match word {
            "generation" => out.push_str(&inside.replacen(word, "if true", 1)),
            "endgeneration" => out.push_str(&inside.replacen(word, "endif", 1)),
            _ => out.push_str(inside),
        }
        out.push_str("%}");
        rest = &rest[end + 2..];
    }
    out.push_str(rest);
    out
}

/// JSON as Python's `json.dumps(…, ensure_ascii=False)` writes it.
fn to_json(value: Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent").ok();
    // `ensure_ascii` and the like change nothing that is written here.
    let value =
        serde_json::to_value(&value).map_err(|e| minijinja::Error::new(Kind::BadSerialization, e.to_string()))?;
    let mut out = Vec::new();
    let written = match indent {
        Some(width) => {
            let spaces = " ".repeat(width);
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, OneLine)),
    };
    written.map_err(|e| minijinja::Error::new(Kind::BadSerialization, e.to_string()))?;
    String::from_utf8(out).map_err(|e| minijinja::Error::new(Kind::BadSerialization, e.to_string()))
}

/// A space after every comma and colon.
struct OneLine;

impl serde_json::ser::Formatter for OneLine {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn messages() -> Vec<Message> {
        vec![
            Message { role: Role::System, content: " Be brief. ".into() },
            Message::user("One & <two>?"),
            Message::assistant("<think>\nhm\n</think>\n\nThree."),
            Message::user("\"é\" and?"),
        ]
    }

    fn template_of(text: &str, special: Map<String, Json>) -> Result<ChatTemplate, Error> {
        ChatTemplate::new("chat_template.jinja".into(), text, special)
    }

    fn rendered(template: &str, settings: Json) -> String {
        let Json::Object(settings) = settings else { panic!() };
        let special = Map::from_iter([("bos_token".to_owned(), json!("<s>"))]);
        template_of(template, special).unwrap().render(&messages(), &settings).unwrap()
    }

    /// What published templates are made of. The text that follows is what transformers 5.23 makes of it
    /// (`apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False)`).
    const TEMPLATE: &str = r#"{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {{- '[SYS]' + messages[0].content.strip() + '\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" and ns.last == messages|length - 1 and not message.content.startswith('<tool>') %}
        {%- set ns.last = (messages|length - 1) - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if loop.first and message.role == 'system' %}
        {%- continue %}
    {%- endif %}
    {%- if '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {% generation %}
    {{- '[' + message.role.upper() + loop.index|string + ']' + content + (message.tool_calls|tojson if message.tool_calls else '') }}
    {% endgeneration %}
    {{ {'a': content, 'b': [1, true]} | tojson }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '[ASSISTANT]\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"#;

    #[test]
    fn templates_are_rendered_as_transformers_does() {
        let expected = include_str!("../../tests/fixtures/chat_template.txt");
        assert_eq!(rendered(TEMPLATE, json!({"enable_thinking": false})), expected);
        assert!(!rendered(TEMPLATE, json!({})).contains("<think>"));
    }

    #[test]
    fn a_refusal_and_a_broken_template_are_told() {
        let error = template_of("{{ raise_exception('only one system message') }}", Map::new()).unwrap();
        let error = error.render(&messages(), &Map::new()).unwrap_err().to_string();
        assert!(error.contains("only one system message"), "{error}");
        let broken = template_of("{% if %}", Map::new()).err().unwrap().to_string();
        assert!(broken.starts_with("chat_template.jinja: its chat template is not one: "), "{broken}");
    }

    #[test]
    fn a_template_that_no_conversation_suits_is_told_from_one_that_refuses_some() {
        let check = |text: &str| template_of(text, Map::new()).unwrap().check(&Map::new());
        let wrong = |text: &str| check(text).unwrap_err().to_string();
        let needs_system =
            "{% if messages[0].role != 'system' %}{{ raise_exception('a system prompt, please') }}{% endif %}";
        let error = wrong(needs_system);
        assert!(error.starts_with("chat_template.jinja: the chat template refuses every conversation: "), "{error}");
        assert!(error.contains("a system prompt, please"), "{error}");
        assert!(wrong(" \n{% if false %}x{% endif %}").ends_with("renders nothing"));
        assert!(
            wrong("{% for part in messages[0].parts %}{{ part }}{% endfor %}user:").ends_with("what the user says")
        );
        assert!(wrong("Question: {{ messages[0].parts }}\nAnswer:").ends_with("what the user says"));
        check("{{ messages[0].content|upper }}").unwrap();
        assert!(matches!(check(needs_system), Err(Error::Model { help: Some(_), .. })));
        let at_odds = "{{ messages[0].content }}{% if messages[1] %}{{ raise_exception('one turn') }}{% endif %}";
        check(at_odds).unwrap();
    }

    #[test]
    fn places_where_a_template_may_stand() {
        let folder = tempfile::tempdir().unwrap();
        let load = || ChatTemplate::load(folder.path());
        let said = |template: ChatTemplate| template.render(&messages()[..1], &Map::new()).unwrap();
        assert!(load().err().unwrap().to_string().ends_with("has no chat template"));
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        write("tokenizer_config.json", r#"{"chat_template": "A{{ eos_token }}", "eos_token": {"content": "</s>"}}"#);
        assert_eq!(said(load().unwrap()), "A</s>");
        let list = r#"{"chat_template": [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]}"#;
        write("tokenizer_config.json", list);
        assert_eq!(said(load().unwrap()), "D");
        write("chat_template.jinja", "J{{ messages[0].role }}");
        assert_eq!(said(load().unwrap()), "Jsystem");
        write("tokenizer_config.json", "{");
        assert!(matches!(load(), Err(Error::Model { .. })));
    }
}
