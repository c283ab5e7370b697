//! A local HTTP server for tests, which answers as it is told, and fails in every way that servers do.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};

/// A request as the server saw it.
#[derive(Debug, Clone)]
pub struct Request {
    /// Counted from 0 over all requests.
    pub number: usize,
    pub path: String,
    pub authorization: Option<String>,
    pub body: Value,
}

/// What a request is answered with.
#[derive(Debug, Clone)]
pub enum Reply {
    Json(Value),
    /// A status with further headers (`name: value` lines) and a body.
    Status(u16, &'static str, Value),
    /// A body that is not JSON.
    Text(&'static str),
    /// Half of this, and the connection is closed.
    Half(Value),
    /// Half of this, and then nothing, until the client gives up.
    HalfAndHang(Value),
    /// The connection is closed at once.
    Close,
    /// Nothing, until the client gives up.
    Hang,
    /// This, after a while.
    Slow(Duration, Value),
}

type Answer = dyn Fn(&Request) -> Reply + Send + Sync;

/// Runs until it is dropped.
pub struct Server {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Request>>>,
    stop: Arc<AtomicBool>,
}

impl Server {
    pub fn start(answer: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (seen, stop): (Arc<Mutex<Vec<Request>>>, _) = (Arc::default(), Arc::new(AtomicBool::new(false)));
        let answer: Arc<Answer> = Arc::new(answer);
        let (log, stopped) = (Arc::clone(&seen), Arc::clone(&stop));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                let (answer, log, stopped) = (Arc::clone(&answer), Arc::clone(&log), Arc::clone(&stopped));
                std::thread::spawn(move || serve(stream, &*answer, &log, &stopped));
            }
        });
        Self { address, seen, stop }
    }

    pub fn url(&self) -> String {
        format!("http://{}/v1", self.address)
    }

    /// All requests until now.
    pub fn seen(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes the thread that waits for connections.
        let _ = TcpStream::connect(self.address);
    }
}

/// Answers requests of one connection until it is closed.
fn serve(stream: TcpStream, answer: &Answer, log: &Mutex<Vec<Request>>, stop: &AtomicBool) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut writer = stream;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let path = line.split(' ').nth(1)?.to_owned();
        let (mut length, mut authorization) = (0, None);
        loop {
            let mut header = String::new();
            reader.read_line(&mut header).ok()?;
            let Some((name, value)) = header.trim().split_once(':') else { break };
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.trim().parse().ok()?,
                "authorization" => authorization = Some(value.trim().to_owned()),
                _ => {}
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).ok()?;
        let body = serde_json::from_slice(&body).ok()?;
        let request = {
            let mut log = log.lock().unwrap();
            let request = Request { number: log.len(), path, authorization, body };
            log.push(request.clone());
            request
        };
        let mut send = |status: u16, headers: &str, body: &str, length: usize| {
            let headers = if headers.is_empty() { String::new() } else { format!("{headers}\r\n") };
            let head = format!(
                "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n{headers}\r\n"
            );
            writer.write_all(format!("{head}{body}").as_bytes()).ok()
        };
        let hang = || {
            while !stop.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(10));
            }
        };
        match answer(&request) {
            Reply::Json(value) => {
                let text = value.to_string();
                send(200, "", &text, text.len())?;
            }
            Reply::Status(status, headers, value) => {
                let text = value.to_string();
                send(status, headers, &text, text.len())?;
            }
            Reply::Text(text) => send(200, "", text, text.len())?,
            Reply::Half(value) => {
                let text = value.to_string();
                send(200, "", &text[..text.len() / 2], text.len())?;
                return None;
            }
            Reply::HalfAndHang(value) => {
                let text = value.to_string();
                send(200, "", &text[..text.len() / 2], text.len())?;
                hang();
                return None;
            }
            Reply::Close => return None,
            Reply::Hang => {
                hang();
                return None;
            }
            Reply::Slow(wait, value) => {
                std::thread::sleep(wait);
                let text = value.to_string();
                send(200, "", &text, text.len())?;
            }
        }
    }
}

/// A chat completion that says `content`.
pub fn completion(content: &str) -> Value {
    json!({
        "id": "x",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
    })
}
